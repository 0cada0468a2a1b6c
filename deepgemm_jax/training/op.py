"""The declaration of the ops that are training's own. The rest is made of other families'."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._core.device import ARCHS
from .._core.op import Kernel, Op, Params
from ..scaled import BLOCK, ScaledArray
from . import reference

FORWARD = "training/sm90_swiglu_forward.cuh"
BACKWARD = "training/sm90_swiglu_backward.cuh"


@dataclasses.dataclass(frozen=True)
class Config:
    """A kernel has one variant: see ``csrc/training/config.h``."""


def variants() -> dict[str, list[Any]]:
    return {source: [Config()] for source in (FORWARD, BACKWARD)}


@dataclasses.dataclass(frozen=True)
class BackwardParams(Params):
    columns: int = 0  # of the transposed


def _kernel(target: str, floats: int, column_major: tuple[str, ...]) -> Kernel:
    """`floats` is the number of the operand that is bfloat16 or float32."""

    def refuses(params, operands):
        if operands[floats].dtype != jnp.bfloat16:
            return operands[floats].dtype.name
        # No block belongs to both gate and up.
        width = operands[0].shape[-1]
        return (
            f"{width} columns, only for multiples of {2 * BLOCK}" if width % (2 * BLOCK) else None
        )

    return Kernel(
        target=target,
        archs=ARCHS,
        attributes=lambda params, operands, device: {"arch": device.arch},
        column_major=column_major,
        refuses=refuses,
    )


_swiglu_forward = Op(
    "swiglu_forward",
    operands={"h": "bfloat16|float32[m i]", "weights?": "float32[m]"},
    results={
        "y": "float8_e4m3fn[m i/2]",
        "y.scale": "float32[m i/256]",
        "kept": "float8_e4m3fn[m i]",
        "kept.scale": "float32[m i/128]",
    },
    limits={"i": (2, 2)},
    reference=reference.swiglu_forward,
    kernel=_kernel("deepgemm_jax_swiglu_forward", 0, ("y.scale", "kept.scale")),
    derivative="it is a part of grouped_mlp, which has one",
    fold=("m",),
    whole=("i",),
)

_swiglu_backward = Op(
    "swiglu_backward",
    operands={
        "h": "float8_e4m3fn[m i]",
        "h.scale": "float32[m i/128]",
        "dy": "bfloat16|float32[m i/2]",
        "group_sizes": "int32[g]",
        "weights?": "float32[m]",
    },
    results={
        "rows": "float8_e4m3fn[m i]",
        "rows.scale": "float32[m i/128]",
        "columns": "float8_e4m3fn[i columns]",
        "columns.scale": "float32[i columns/128]",
        "y": "float8_e4m3fn[i/2 columns]",
        "y.scale": "float32[i/2 columns/128]",
        # Sums over the blocks of a half, which are the caller's to add up.
        "d_weights": "float32[m i/256]",
    },
    limits={"i": (2, 2)},
    reference=reference.swiglu_backward,
    kernel=_kernel(
        "deepgemm_jax_swiglu_backward",
        2,
        ("h.scale", "rows.scale", "columns.scale", "y.scale"),
    ),
    derivative="it is a part of grouped_mlp's",
    batched=True,
    # The rows of a group may be anywhere.
    whole=("m", "i", "g"),
)


def swiglu_forward(
    h: jax.Array, weights: jax.Array | None, implementation: str | None
) -> tuple[ScaledArray, ScaledArray]:
    """The result of a gated activation and what is kept of its input h, both quantised per token.

    Args:
      h: gate and up, [M, 2 I].
      weights: None, or float32 [M] that each row of the result is multiplied by.
      implementation: as the ops of `quantize` have it.

    Returns:
      y, [M, I]; and h, [M, 2 I].
    """
    operands = [h] if weights is None else [h, weights]
    y, y_scale, kept, kept_scale = _swiglu_forward(*operands, params=Params(implementation))
    return ScaledArray(y, y_scale), ScaledArray(kept, kept_scale)


def swiglu_backward(
    h: ScaledArray,
    dy: jax.Array,
    group_sizes: jax.Array,
    weights: jax.Array | None,
    implementation: str | None,
) -> tuple[ScaledArray, ScaledArray, ScaledArray, jax.Array]:
    """From what `swiglu_forward` kept, all that products take of its gradient.

    Args:
      h: gate and up, [M, 2 I].
      dy: the gradient of y, [M, I].
      group_sizes: int32 [G], as `quantize_transpose` has them.
      weights, implementation: as there.

    Returns:
      dh along its rows, [M, 2 I]; its transposed along the groups' rows, as `quantize_transpose`
      gives it, [2 I, P]; that of y, [I, P]; and the gradient of the weights, float32 [M].
    """
    columns = BLOCK * (len(dy) // BLOCK + len(group_sizes))
    operands = (h.data, h.scale, dy, group_sizes, *(() if weights is None else (weights,)))
    *of, d_weights = _swiglu_backward(*operands, params=BackwardParams(implementation, columns))
    rows, transposed, y = map(ScaledArray, of[::2], of[1::2])
    return rows, transposed, y, d_weights.sum(-1)
