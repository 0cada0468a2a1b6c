"""Operands that lie the other way round."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..layout import layout_transpose
from ..scaled import ScaledArray, unpack


def transposed(
    op: str, name: str, x: Any, implementation: str | None, ndim: int = 2
) -> ScaledArray:
    """A scaled operand with its last two dims interchanged."""
    data, scale = unpack(op, name, x)
    if data.ndim != ndim or scale.ndim != ndim:
        raise ValueError(
            f"{op}: {name} has shapes {data.shape} and {scale.shape}, wanted {ndim} dimensions each"
        )
    # "cuda" is asked of the product: the transposition's kernel takes fewer shapes.
    plain = "xla" if implementation == "xla" else None
    interchange = functools.partial(layout_transpose, implementation=plain)
    for _ in range(ndim - 3):
        interchange = jax.vmap(interchange)
    return ScaledArray(interchange(data), jnp.swapaxes(scale, -1, -2))
