"""The declaration of the op that is training's own. The rest is made of other families'."""

import dataclasses

import jax
import jax.numpy as jnp

from .._core.device import ARCHS
from .._core.op import Kernel, Op, Params
from ..scaled import BLOCK, ScaledArray
from . import reference

SOURCE = "training/sm90_swiglu_backward.cuh"


@dataclasses.dataclass(frozen=True)
class Config:
    """The one variant: see ``csrc/training/config.h``."""


@dataclasses.dataclass(frozen=True)
class BackwardParams(Params):
    columns: int = 0  # of the transposed


def _refuses(params, operands):
    h, _, dy, *_ = operands
    if dy.dtype != jnp.bfloat16:
        return f"dy of {dy.dtype}"
    # No block belongs to both gate and up.
    columns = dy.shape[-1]
    return f"{columns} columns, only for multiples of {BLOCK}" if columns % BLOCK else None


_swiglu_backward_transpose = Op(
    "swiglu_backward_transpose",
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
    reference=reference.swiglu_backward_transpose,
    kernel=Kernel(
        target="deepgemm_jax_swiglu_backward",
        archs=ARCHS,
        attributes=lambda params, operands, device: {"arch": device.arch},
        column_major=("h.scale", "rows.scale", "columns.scale", "y.scale"),
        refuses=_refuses,
    ),
    derivative="it is a gradient",
    batched=True,
    # The rows of a group may be anywhere.
    whole=("m", "i", "g"),
)


def swiglu_backward_transpose(
    h: ScaledArray,
    dy: jax.Array,
    group_sizes: jax.Array,
    weights: jax.Array | None,
    implementation: str | None,
) -> tuple[ScaledArray, ScaledArray, ScaledArray, jax.Array]:
    """From a gated activation's input, quantised per token, all that products take of its gradient.

    Args:
      h: gate and up, [M, 2 I].
      dy: the gradient of y, the activation's result, [M, I].
      group_sizes: int32 [G], as `quantize_transpose` has them.
      weights: None, or float32 [M] that each row of y was multiplied by.
      implementation: as the ops of `quantize` have it.

    Returns:
      dh along its rows, [M, 2 I]; its transposed along the groups' rows, as `quantize_transpose`
      gives it, [2 I, P]; that of y, [I, P]; and the gradient of the weights, float32 [M].
    """
    columns = BLOCK * (len(dy) // BLOCK + len(group_sizes))
    operands = (h.data, h.scale, dy, group_sizes, *(() if weights is None else (weights,)))
    *of, d_weights = _swiglu_backward_transpose(
        *operands, params=BackwardParams(implementation, columns)
    )
    rows, transposed, y = map(ScaledArray, of[::2], of[1::2])
    return rows, transposed, y, d_weights.sum(-1)
