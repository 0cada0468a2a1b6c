"""The declaration of the quantising ops."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.device import ARCHS
from .._core.op import Kernel, Op, Params
from ..scaled import BLOCK
from . import config, reference

VECTOR = 8  # elements of a row that a thread of the kernels loads and stores at once


@dataclasses.dataclass(frozen=True)
class CastParams(Params):
    dtype: Any = jnp.float8_e4m3fn
    round_up: bool = False  # scales to powers of two


@dataclasses.dataclass(frozen=True)
class ActivationParams(CastParams):
    activation: str = "silu"


@dataclasses.dataclass(frozen=True)
class GroupedParams(CastParams):
    columns: int = 0  # of the transposed


FLOAT = "bfloat16|float32|float16"
DERIVATIVE = (
    "its result is quantised. Stop the gradient of its operands, or wrap it in jax.custom_vjp "
    "together with the product that takes its result"
)


def _refuses_columns(params, operands, multiple=VECTOR, of=1):
    k = operands[0].shape[-1] // of
    return f"{k} columns, only for multiples of {multiple}" if k % multiple else None


def _kernel(
    target: str,
    config_of: Callable[[Any, Any], Any],
    column_major: tuple[str, ...] = (),
    refuses: Callable[[Any, Sequence[Any]], str | None] = _refuses_columns,
) -> Kernel:
    """`config_of(params, dtype)` is the variant for operands of that dtype."""

    def attributes(params, operands, device):
        chosen = dataclasses.astuple(config_of(params, operands[0].dtype))
        return {
            "config": np.array(chosen, np.int64),
            "arch": device.arch,
            "round_up": np.int64(params.round_up),
        }

    def refuses_dtypes_too(params, operands):
        if operands[0].dtype == jnp.float16:
            return "float16"
        return refuses(params, operands)

    return Kernel(
        target=f"deepgemm_jax_quantize_{target}",
        archs=ARCHS,
        attributes=attributes,
        column_major=column_major,
        refuses=refuses_dtypes_too,
    )


def _cast(
    name: str, scale: str, block: tuple[int, int], kernel: Kernel, fold: Sequence[str] = ()
) -> Op:
    return Op(
        name,
        operands={"x": f"{FLOAT}[m k]"},
        results={"data": "dtype[m k]", "scale": f"float32[{scale}]"},
        limits={"k": (1, 1)},
        reference=functools.partial(reference.cast, block=block),
        kernel=kernel,
        derivative=DERIVATIVE,
        batched=True,
        fold=fold,
    )


per_token_cast_to_fp8 = _cast(
    "per_token_cast_to_fp8",
    "m k/128",
    (1, BLOCK),
    _kernel(
        "rows",
        lambda params, dtype: config.rows("cast", "silu", dtype, params.dtype),
        column_major=("scale",),
    ),
    fold=("m",),
)
per_channel_cast_to_fp8 = _cast(
    "per_channel_cast_to_fp8",
    "m/128 k",
    (BLOCK, 1),
    _kernel(
        "tiles",
        lambda params, dtype: config.tiles("per_channel", dtype, params.dtype),
    ),
)
per_block_cast_to_fp8 = _cast(
    "per_block_cast_to_fp8",
    "m/128 k/128",
    (BLOCK, BLOCK),
    _kernel(
        "tiles",
        lambda params, dtype: config.tiles("per_block", dtype, params.dtype),
    ),
)


def _cast_with_scale(name: str) -> Op:
    """Given the scale of each row: what it is of is up to the caller, and XLA divides the search
    for the largest magnitude among devices better than any rule for an op would."""
    return Op(
        name,
        operands={"x": f"{FLOAT}[m k]", "scale": "float32[m]"},
        results={"data": "dtype[m k]"},
        limits={"k": (1, 1)},
        reference=reference.cast_with_scale,
        kernel=_kernel(
            "rows", lambda params, dtype: config.rows("scaled", "silu", dtype, params.dtype)
        ),
        derivative=DERIVATIVE,
        batched=True,
        fold=("m",),
    )


per_row_cast_to_fp8 = _cast_with_scale("per_row_cast_to_fp8")
per_tensor_cast_to_fp8 = _cast_with_scale("per_tensor_cast_to_fp8")

whole_rows_cast_to_fp8 = Op(
    "per_row_cast_to_fp8",
    operands={"x": f"{FLOAT}[m k]"},
    results={"data": "dtype[m k]", "scale": "float32[m]"},
    limits={"k": (1, 1)},
    reference=reference.cast_whole_rows,
    kernel=_kernel(
        "rows", lambda params, dtype: config.rows("whole_rows", "silu", dtype, params.dtype)
    ),
    derivative=DERIVATIVE,
    batched=True,
    fold=("m",),
    whole=("k",),
)


def _refuses_transposed(params, operands):
    m = operands[0].shape[-2]
    if len(operands) == 1 and m % (2 * VECTOR):
        return f"{m} rows, only for multiples of {2 * VECTOR}"
    return _refuses_columns(params, operands)


BOTH_WAYS = _kernel(
    "tiles",
    lambda params, dtype: config.tiles("both_ways", dtype, params.dtype),
    column_major=("scale", "transposed.scale"),
    refuses=_refuses_transposed,
)

quantize_transpose = Op(
    "quantize_transpose",
    operands={"x": f"{FLOAT}[m k]"},
    results={
        "data": "dtype[m k]",
        "scale": "float32[m k/128]",
        "transposed.data": "dtype[k m]",
        "transposed.scale": "float32[k m/128]",
    },
    limits={"k": (1, 1)},
    reference=reference.quantize_transpose,
    kernel=BOTH_WAYS,
    derivative=DERIVATIVE,
    batched=True,
)

per_block_cast_both_ways = Op(
    "per_block_cast_both_ways",
    operands={"x": f"{FLOAT}[m k]"},
    results={
        "data": "dtype[m k]",
        "scale": "float32[m/128 k/128]",
        "transposed.data": "dtype[k m]",
        "transposed.scale": "float32[k/128 m/128]",
    },
    limits={"k": (1, 1)},
    reference=reference.per_block_cast_both_ways,
    kernel=_kernel(
        "tiles",
        lambda params, dtype: config.tiles("per_block_both_ways", dtype, params.dtype),
        refuses=_refuses_transposed,
    ),
    derivative=DERIVATIVE,
    batched=True,
)

quantize_transpose_grouped = Op(
    "quantize_transpose",
    operands={"x": f"{FLOAT}[m k]", "group_sizes": "int32[g]"},
    results={
        "data": "dtype[m k]",
        "scale": "float32[m k/128]",
        "transposed.data": "dtype[k columns]",
        "transposed.scale": "float32[k columns/128]",
    },
    limits={"k": (1, 1)},
    reference=reference.quantize_transpose_grouped,
    kernel=BOTH_WAYS,
    derivative=DERIVATIVE,
    batched=True,
    # The rows of a group may be anywhere.
    whole=("m", "g"),
)


def _refuses_weights(weights):
    return next((f"weights of {w.dtype}" for w in weights if w.dtype != jnp.float32), None)


def _activation(name: str, backward: str, gated: bool) -> Op:
    """Of x, or of gate and up beside each other: `i` is the width of x, in either case."""
    parts = 2 if gated else 1

    def refuses(params, operands):
        _, *weights = operands
        return _refuses_weights(weights) or _refuses_columns(params, operands, of=parts)

    return Op(
        name,
        operands={"x": f"{FLOAT}[m i]", "weights?": f"{FLOAT}[m]"},
        results={"data": f"dtype[m i/{parts}]", "scale": f"float32[m i/{parts * BLOCK}]"},
        limits={"i": (parts, parts)},
        reference=functools.partial(reference.activation_quantize, gated=gated),
        kernel=_kernel(
            "rows",
            lambda params, dtype: config.rows(
                "gated" if gated else "activated", params.activation, dtype, params.dtype
            ),
            column_major=("scale",),
            refuses=refuses,
        ),
        derivative=f"{DERIVATIVE}; {backward} computes its gradient",
        batched=True,
        fold=("m",),
        whole=("i",) if gated else (),
    )


def _activation_backward(name: str, gated: bool) -> Op:
    parts = 2 if gated else 1

    def refuses(params, operands):
        x, dy, *weights = operands
        if dy.dtype != x.dtype:
            return f"dy of {dy.dtype} with x of {x.dtype}"
        # No block of the result belongs to both halves.
        multiple = BLOCK if gated else VECTOR
        return _refuses_weights(weights) or _refuses_columns(params, operands, multiple, parts)

    return Op(
        name,
        operands={"x": f"{FLOAT}[m i]", "dy": f"{FLOAT}[m i/{parts}]", "weights?": f"{FLOAT}[m]"},
        results={
            "data": "dtype[m i]",
            "scale": f"float32[m i/{BLOCK}]",
            # Sums over blocks of dy's columns, which are the caller's to add up.
            "d_weights": f"float32[m i/{parts * BLOCK}]",
        },
        limits={"i": (parts, parts)},
        reference=functools.partial(reference.activation_quantize_backward, gated=gated),
        kernel=_kernel(
            "rows",
            lambda params, dtype: config.rows(
                "gated_backward" if gated else "activated_backward",
                params.activation,
                dtype,
                params.dtype,
            ),
            column_major=("scale",),
            refuses=refuses,
        ),
        derivative=DERIVATIVE,
        batched=True,
        fold=("m",),
        whole=("i",) if gated else (),
    )


activation_quantize = _activation("activation_quantize", "activation_quantize_backward", False)
activation_quantize_backward = _activation_backward("activation_quantize_backward", False)
swiglu_quantize = _activation("swiglu_quantize", "swiglu_quantize_backward", True)
swiglu_quantize_backward = _activation_backward("swiglu_quantize_backward", True)
