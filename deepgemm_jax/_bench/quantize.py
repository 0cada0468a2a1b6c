"""The cases of what moves more than it computes: casts, activations, transpositions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import layout, quantize
from .._core.device import cuda_device
from ..layout import config as layout_config
from ..quantize import config
from ..runtime import Variant
from ..scaled import BLOCK
from .case import Case, Program, nbytes, normal

FP8 = jnp.float8_e4m3fn


def per_token_cast(m: int, k: int) -> Case:
    return _rows("cast", quantize.per_token_cast_to_fp8, normal(0, m, k))


def per_channel_cast(m: int, k: int) -> Case:
    return _tiles("per_channel", quantize.per_channel_cast_to_fp8, normal(0, m, k))


def per_block_cast(m: int, k: int) -> Case:
    return _tiles("per_block", quantize.per_block_cast_to_fp8, normal(0, m, k))


def per_row_cast(m: int, k: int) -> Case:
    return _rows("whole_rows", quantize.per_row_cast_to_fp8, normal(0, m, k))


def per_tensor_cast_by_given_scale(m: int, k: int) -> Case:
    scale = jnp.full((1, 1), 0.01)
    return _rows("scaled", quantize.per_tensor_cast_to_fp8, normal(0, m, k), scale)


def quantize_transpose(m: int, k: int) -> Case:
    return _tiles("both_ways", quantize.quantize_transpose, normal(0, m, k))


def quantize_transpose_grouped(groups: int, m: int, k: int) -> Case:
    """Groups of unequal sizes that fill x but for a few rows."""
    sizes = np.diff(np.linspace(0, 1, groups + 1) ** 1.1 * (m - 100)).astype(np.int32)
    return _tiles("both_ways", quantize.quantize_transpose, normal(0, m, k), jnp.asarray(sizes))


def swiglu_quantize(m: int, h: int) -> Case:
    return _rows("gated", quantize.swiglu_quantize, normal(0, m, 2 * h), _weights(m))


def swiglu_quantize_backward(m: int, h: int) -> Case:
    operands = normal(0, m, 2 * h), normal(1, m, h), _weights(m)
    return _rows("gated_backward", quantize.swiglu_quantize_backward, *operands)


def activation_quantize(m: int, h: int) -> Case:
    return _rows("activated", quantize.activation_quantize, normal(0, m, h), _weights(m))


def layout_transpose(itemsize: int, m: int, n: int) -> Case:
    dtype = {1: jnp.int8, 2: jnp.bfloat16, 4: jnp.float32}[itemsize]
    return _transpose(jax.jit(lambda: (normal(0, m, n) * 50).astype(dtype))())


def mn_major(groups: int, mn: int, k: int) -> Case:
    """Scales that come row-major, from a file for instance: their layout is a transposition."""
    return _transpose(jax.random.uniform(jax.random.key(0), (groups, mn, k // BLOCK)))


def _transpose(x: jax.Array) -> Case:
    variant = layout_config.Config(x.dtype.itemsize)
    return _case(layout.layout_transpose, (x,), layout_config.SOURCE, variant)


def _rows(function: str, op: Callable, *operands: jax.Array) -> Case:
    return _case(op, operands, config.ROWS, config.rows(function, "silu", jnp.bfloat16, FP8))


def _tiles(tiling: str, op: Callable, *operands: jax.Array) -> Case:
    return _case(op, operands, config.TILES, config.tiles(tiling, jnp.bfloat16, FP8))


def _case(op: Callable, operands: tuple[jax.Array, ...], source: str, variant: Any) -> Case:
    plain = functools.partial(op, implementation="xla")
    return Case(
        program=Program(op, operands),
        flops=0,
        bytes=nbytes((operands, jax.eval_shape(op, *operands))),
        peak="fp8",
        config=dataclasses.asdict(variant),
        variant=Variant(source, dataclasses.astuple(variant), cuda_device().arch),
        error=lambda result: float(_share_of_others(result, jax.jit(plain)(*operands))),
        others={"xla": Program(plain, operands)},
    )


def _weights(m: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(2), (m,))


@jax.jit
def _share_of_others(result: Any, wanted: Any) -> jax.Array:
    """The share of elements that are not XLA's, where 1e-5 of one is no difference."""
    pairs = [
        (x.astype(jnp.float32), y.astype(jnp.float32))
        for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True)
    ]
    others = jnp.stack([jnp.sum(abs(x - y) > 1e-5 * abs(y)) for x, y in pairs])
    return others.sum() / sum(x.size for x, _ in pairs)
