"""The declaration of the quantising ops."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from .._core.op import Op, Params
from . import reference


@dataclasses.dataclass(frozen=True)
class CastParams(Params):
    dtype: Any = jnp.float8_e4m3fn
    round_up: bool = False  # scales to powers of two


@dataclasses.dataclass(frozen=True)
class ActivationParams(CastParams):
    activation: str = "silu"


FLOAT = "bfloat16|float32|float16"
DERIVATIVE = (
    "its result is quantised. Stop the gradient of its operands, or wrap it in jax.custom_vjp "
    "together with the product that takes its result"
)


def _cast(name: str, scale: str, block: tuple[int, int], fold: Sequence[str] = ()) -> Op:
    return Op(
        name,
        operands={"x": f"{FLOAT}[m k]"},
        results={"data": "dtype[m k]", "scale": f"float32[{scale}]"},
        limits={"k": (1, 1)},
        reference=functools.partial(reference.cast, block=block),
        derivative=DERIVATIVE,
        batched=True,
        fold=fold,
    )


per_token_cast_to_fp8 = _cast("per_token_cast_to_fp8", "m k/128", (1, 128), fold=("m",))
per_channel_cast_to_fp8 = _cast("per_channel_cast_to_fp8", "m/128 k", (128, 1))
per_block_cast_to_fp8 = _cast("per_block_cast_to_fp8", "m/128 k/128", (128, 128))


def _cast_with_scale(name: str) -> Op:
    """Given the scale of each row: what it is of is up to the caller, and XLA divides the search
    for the largest magnitude better than any rule for an op would."""
    return Op(
        name,
        operands={"x": f"{FLOAT}[m k]", "scale": "float32[m]"},
        results={"data": "dtype[m k]"},
        limits={"k": (1, 1)},
        reference=reference.cast_with_scale,
        derivative=DERIVATIVE,
        batched=True,
        fold=("m",),
    )


per_row_cast_to_fp8 = _cast_with_scale("per_row_cast_to_fp8")
per_tensor_cast_to_fp8 = _cast_with_scale("per_tensor_cast_to_fp8")

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
    derivative=DERIVATIVE,
    batched=True,
)

quantize_transpose_grouped = Op(
    "quantize_transpose",
    operands={"x": f"{FLOAT}[m k]", "rows": "int32[p]"},
    results={
        "data": "dtype[m k]",
        "scale": "float32[m k/128]",
        "transposed.data": "dtype[k p]",
        "transposed.scale": "float32[k p/128]",
    },
    limits={"k": (1, 1)},
    reference=reference.quantize_transpose_grouped,
    derivative=DERIVATIVE,
    batched=True,
    # A row of x may be asked for by any column of the transposed.
    whole=("m", "p"),
)

# `i` is the width of gate and up together, so that `i/2` is the width of either.
swiglu_quantize = Op(
    "swiglu_quantize",
    operands={"x": f"{FLOAT}[m i]", "weights?": f"{FLOAT}[m]"},
    results={"data": "dtype[m i/2]", "scale": "float32[m i/256]"},
    limits={"i": (2, 2)},
    reference=reference.swiglu_quantize,
    derivative=f"{DERIVATIVE}; swiglu_quantize_backward computes its gradient",
    batched=True,
    fold=("m",),
    whole=("i",),
)

swiglu_quantize_backward = Op(
    "swiglu_quantize_backward",
    operands={"x": f"{FLOAT}[m i]", "dy": f"{FLOAT}[m i/2]", "weights?": f"{FLOAT}[m]"},
    results={"data": "dtype[m i]", "scale": "float32[m i/128]", "d_weights": "float32[m]"},
    limits={"i": (2, 2)},
    reference=reference.swiglu_quantize_backward,
    derivative=DERIVATIVE,
    batched=True,
    fold=("m",),
    whole=("i",),
)
