"""The dense GEMMs' cases."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from .._core.device import cuda_device
from ..gemm import config as configs
from ..gemm import fp8_gemm_nt as op
from ..quantize import per_token_cast_to_fp8, prepare_weight
from ..runtime import Variant
from ..scaled import BLOCK, ScaledArray
from .case import Case, Program

CHECKED_ROWS = 16


def problem(m: int, n: int, k: int) -> configs.Problem:
    return configs.Problem(m, n, k, batch=1, out_dtype=jnp.bfloat16, accumulate=False)


def operands(m: int, n: int, k: int) -> tuple[jax.Array, jax.Array, ScaledArray, ScaledArray]:
    """x and w in bfloat16, and a and b, which are the same in FP8."""
    x, w = _normal(0, m, k), _normal(1, n, k)
    return x, w, jax.jit(per_token_cast_to_fp8)(x), jax.jit(prepare_weight)(w)


def fp8_gemm_nt(m: int, n: int, k: int) -> Case:
    x, w, a, b = operands(m, n, k)
    device = cuda_device()
    config = configs.choose(problem(m, n, k), device)
    return Case(
        program=Program(op, (a, b)),
        flops=2 * m * n * k,
        bytes=sum(array.nbytes for array in jax.tree.leaves((a, b))) + 2 * m * n,
        peak="fp8",
        config=dataclasses.asdict(config),
        variant=Variant(configs.SOURCE, dataclasses.astuple(config), device.arch),
        error=lambda result: _row_error(result, a, b),
        others={
            "with_quantize": Program(lambda x, b: op(per_token_cast_to_fp8(x), b), (x, b)),
            "xla_bf16": Program(_dot, (x, w)),
            "xla_fp8": Program(lambda a, b: _dot(_dequantize(a, 1), _dequantize(b, BLOCK)), (a, b)),
        },
        chain=lambda calls: _chain(m, n, k, calls),
    )


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


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
    a = [jax.jit(per_token_cast_to_fp8)(_normal(i, m, k)) for i in range(side)]
    b = [jax.jit(prepare_weight)(_normal(side + i, n, k)) for i in range(side)]

    def run(a, b):
        return [op(a[i // side], b[i % side]) for i in range(calls)]

    return Program(run, (a, b))


def _row_error(result: jax.Array, a: ScaledArray, b: ScaledArray) -> float:
    """The largest error in a row over the row's root mean square, in a sample of the rows."""
    m = result.shape[0]
    rows = np.unique(np.linspace(0, m - 1, CHECKED_ROWS).astype(int))
    a_data, a_scale = (np.asarray(array[rows], np.float64) for array in (a.data, a.scale))
    b_data, b_scale = np.asarray(b.data), np.asarray(b.scale, np.float64)
    expected = np.zeros((len(rows), b_data.shape[0]))
    for i in range(a_scale.shape[1]):
        step = slice(i * BLOCK, (i + 1) * BLOCK)
        columns = np.repeat(b_scale[:, i], BLOCK)[: b_data.shape[0]]
        product = a_data[:, step] @ b_data[:, step].astype(np.float64).T
        expected += product * a_scale[:, i, None] * columns
    scale = np.sqrt(np.mean(expected**2, axis=1, keepdims=True))
    return float(np.max(np.abs(np.asarray(result[rows], np.float64) - expected) / scale))
