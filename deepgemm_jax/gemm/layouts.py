"""Operands that lie the other way round."""

from typing import Any

import jax.numpy as jnp

from ..layout import layout_transpose
from ..scaled import ScaledArray, unpack

ALIGNED = 16  # bytes of a row, as the copy engine wants them


def transposed(
    op: str, name: str, x: Any, implementation: str | None, ndim: int = 2
) -> ScaledArray:
    """A scaled operand with its last two dims interchanged, its data filled up with zeros to whole
    rows of 16 bytes."""
    data, scale = unpack(op, name, x)
    if data.ndim != ndim or scale.ndim != ndim:
        raise ValueError(
            f"{op}: {name} has shapes {data.shape} and {scale.shape}, wanted {ndim} dimensions each"
        )
    rows = -data.shape[-2] % ALIGNED
    data = jnp.pad(data, [*[(0, 0)] * (ndim - 2), (0, rows), (0, 0)])
    # "cuda" is asked of the product: the transposition's kernel takes fewer shapes.
    plain = "xla" if implementation == "xla" else None
    return ScaledArray(layout_transpose(data, implementation=plain), jnp.swapaxes(scale, -1, -2))
