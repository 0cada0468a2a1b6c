"""The dense GEMMs' cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import gemm
from .._core.device import cuda_device
from ..quantize import per_row_cast_to_fp8, per_token_cast_to_fp8, prepare_weight
from ..runtime import Variant
from ..scaled import BLOCK, ScaledArray
from .case import Case, Program, nbytes, normal

CHECKED_ROWS, CHECKED_COLUMNS = 16, 512


def operands(m: int, n: int, k: int) -> tuple[jax.Array, jax.Array, ScaledArray, ScaledArray]:
    """x and w in bfloat16, and a and b, which are the same in FP8."""
    x, w = normal(0, m, k), normal(1, n, k)
    return x, w, jax.jit(per_token_cast_to_fp8)(x), jax.jit(prepare_weight)(w)


def fp8_gemm_nt(m: int, n: int, k: int) -> Case:
    x, w, a, b = operands(m, n, k)
    return case(
        Program(gemm.fp8_gemm_nt, (a, b)),
        m * n * k,
        "fp8",
        lambda result: dense_error(result, a, b),
        others={
            "with_quantize": Program(
                lambda x, b: gemm.fp8_gemm_nt(per_token_cast_to_fp8(x), b), (x, b)
            ),
            "xla_bf16": Program(_dot, (x, w)),
            "xla_fp8": Program(lambda a, b: _dot(_dequantize(a, 1), _dequantize(b, BLOCK)), (a, b)),
        },
        chain=lambda calls: _chain(m, n, k, calls),
    )


def fp8_gemm_1d1d(m: int, n: int, k: int) -> Case:
    """In float32, added to C."""
    x, w = normal(0, m, k), normal(1, n, k)
    a, b = (jax.jit(per_token_cast_to_fp8)(array) for array in (x, w))
    return case(
        Program(gemm.fp8_gemm_1d1d, (a, b, jnp.zeros((m, n)))),
        m * n * k,
        "fp8",
        lambda result: dense_error(result, a, b),
    )


def fp8_gemm_rows(m: int, n: int, k: int) -> Case:
    """With one scale for each row of A and of B."""
    a, b = (jax.jit(per_row_cast_to_fp8)(normal(seed, rows, k)) for seed, rows in ((0, m), (1, n)))
    return case(
        Program(gemm.fp8_gemm_nt, (a, b)),
        m * n * k,
        "fp8",
        lambda result: dense_error(result, a, b),
    )


def bf16_gemm_nt(m: int, n: int, k: int) -> Case:
    x, w = normal(0, m, k), normal(1, n, k)
    return case(
        Program(gemm.bf16_gemm_nt, (x, w)),
        m * n * k,
        "bf16",
        lambda result: dense_error(result, x, w),
        others={"xla_bf16": Program(_dot, (x, w))},
    )


def case(
    program: Program,
    products: int,
    peak: str,
    error: Callable[[jax.Array], float],
    others: Mapping[str, Program] | None = None,
    chain: Callable[[int], Program] | None = None,
    moved: int | None = None,
) -> Case:
    """A program of one GEMM of so many multiply-adds, which moves each of its arguments and its
    result once, or so many bytes."""
    [found] = gemm.explain(program.function, *program.args)
    result = jax.eval_shape(program.function, *program.args)
    if moved is None:
        moved = nbytes((program.args, result))
    return Case(
        program=program,
        flops=2 * products,
        bytes=moved,
        peak=peak,
        config=vars(found.config),
        variant=Variant(found.config.source, found.config.integers, cuda_device().arch),
        error=error,
        others=others or {},
        chain=chain,
    )


def dense_error(result: jax.Array, a: Any, b: Any) -> float:
    return sampled_error(
        result,
        np.arange(len(result)),
        lambda rows, columns: float64(a, rows) @ float64(b, columns).T,
    )


def float64(x: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of an operand, dequantised in float64."""
    if not isinstance(x, ScaledArray):
        return np.asarray(x[rows]).astype(np.float64)
    block, depth = x.recipe
    scale = np.asarray(x.scale[rows // block], np.float64)
    return np.asarray(x.data[rows]).astype(np.float64) * np.repeat(scale, depth, 1)[:, : x.shape[1]]


def sampled_error(
    result: jax.Array,
    rows: np.ndarray,
    product: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> float:
    """The largest error in a row over the row's root mean square, in a sample of these rows and of
    the columns; `product(rows, columns)` is what is wanted there."""
    rows = rows[_spread(len(rows), CHECKED_ROWS)]
    columns = _spread(result.shape[1], CHECKED_COLUMNS)
    wanted = product(rows, columns)
    errors = np.abs(np.asarray(result[rows[:, None], columns]).astype(np.float64) - wanted)
    return float(np.max(errors.max(1) / np.sqrt(np.mean(wanted**2, 1))))


def _spread(length: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, count).astype(int))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    ).astype(jnp.bfloat16)


def _dequantize(x: ScaledArray, rows: int) -> jax.Array:
    """In bfloat16 throughout, as is fastest."""
    m, k = x.shape
    wide = jnp.repeat(jnp.repeat(x.scale.astype(jnp.bfloat16), rows, 0)[:m], BLOCK, 1)[:, :k]
    return x.data.astype(jnp.bfloat16) * wide


def _chain(m: int, n: int, k: int, calls: int) -> Program:
    """Calls that XLA cannot merge: no two have both operands in common."""
    side = int(np.ceil(calls**0.5))
    a = [jax.jit(per_token_cast_to_fp8)(normal(i, m, k)) for i in range(side)]
    b = [jax.jit(prepare_weight)(normal(side + i, n, k)) for i in range(side)]

    def run(a, b):
        return [gemm.fp8_gemm_nt(a[i // side], b[i % side]) for i in range(calls)]

    return Program(run, (a, b))
