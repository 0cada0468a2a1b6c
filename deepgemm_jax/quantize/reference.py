"""Quantisation in plain JAX: what runs where there is no kernel, and the tests' first oracle."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core import sums
from ..scaled import BLOCK, round_up_to_power_of_two

# The least normal float32. No scale is smaller, so that scale and reciprocal are exact in what
# flushes denormals to zero and in what does not; denormal inputs are taken for zero everywhere.
TINY = float(jnp.finfo(jnp.float32).tiny)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    """x (1 + tanh(y)) / 2, as x σ(2 y), which does not lose the digits of a small 1 + tanh(y)."""
    # Beyond 20 σ is 0 or 1, and the cube of what is far beyond would be infinite.
    bounded = jnp.where(jnp.abs(x) > 20, 20 * jnp.sign(x), x)
    y = math.sqrt(2 / math.pi) * (bounded + 0.044715 * bounded**3)
    return x * jax.nn.sigmoid(2 * y)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": _gelu_tanh,
}


def scale_of(amax: jax.Array, params: Any) -> jax.Array:
    """The scale of a block whose largest magnitude is `amax`; NaN if that is not finite."""
    # Not a quotient: XLA makes a product of it on some devices and not on others.
    scale = jnp.maximum(amax * (1 / float(jnp.finfo(params.dtype).max)), TINY)
    if params.round_up:
        scale = round_up_to_power_of_two(scale)
    return jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def widen(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < TINY, 0, x)


def largest_magnitude(x: jax.Array, axis: Any, keepdims: bool = False) -> jax.Array:
    """Infinity if there is one, NaN if there is one; 0 of nothing.

    A maximum of integers, which order float32's magnitudes as they are: on a CPU XLA's maximum of
    floats may lose a NaN.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    bits = jnp.max(bits, axis=axis, keepdims=keepdims, initial=0)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def narrow(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """x / scale in `dtype`: to the nearest, ties to even, saturating; NaN stays NaN."""
    largest = float(jnp.finfo(dtype).max)
    x = x * (1 / scale)
    # Comparisons, which NaN fails: a minimum may lose it.
    x = jnp.where(x > largest, largest, jnp.where(x < -largest, -largest, x))
    return x.astype(dtype)


def cast(params, x, *, block=(1, BLOCK)):
    """`x`, [..., M, K], and the scale of each block, of which the last may be partial."""
    x = widen(x)
    (*batch, m, k), (rows, columns) = x.shape, block
    padding = [(0, 0)] * len(batch) + [(0, -m % rows), (0, -k % columns)]
    padded = jnp.pad(x, padding)
    blocks = padded.reshape(*batch, -(-m // rows), rows, -(-k // columns), columns)
    scale = scale_of(largest_magnitude(blocks, axis=(-3, -1)), params)
    data = narrow(blocks, scale[..., :, None, :, None], params.dtype)
    return [data.reshape(padded.shape)[..., :m, :k], scale]


def cast_with_scale(params, x, scale):
    return [narrow(widen(x), scale[..., None], params.dtype)]


def cast_whole_rows(params, x):
    scale = scale_of(largest_magnitude(widen(x), axis=-1), params)
    return [*cast_with_scale(params, x, scale), scale]


def quantize_transpose(params, x):
    return [*cast(params, x), *cast(params, jnp.swapaxes(x, -1, -2))]


def per_block_cast_both_ways(params, x):
    given = cast(params, x, block=(BLOCK, BLOCK))
    return [*given, *(jnp.swapaxes(part, -1, -2) for part in given)]


def rows_of_groups(sizes: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    """The first row of each group, and its number of rows: no group reaches past the last of M."""
    starts, ends = sums.spans(sizes, m)
    return starts, ends - starts


def fill_up(sizes: jax.Array) -> jax.Array:
    return (sizes + BLOCK - 1) & -BLOCK


def quantize_transpose_grouped(params, x, sizes):
    """Each group's columns of the transposed begin at a multiple of 128."""
    if x.ndim > 2:
        return jax.vmap(lambda x, sizes: quantize_transpose_grouped(params, x, sizes))(x, sizes)
    m = x.shape[0]
    starts, sizes = rows_of_groups(sizes, m)
    padded_ends = jnp.cumsum(fill_up(sizes))
    column = jnp.arange(params.columns, dtype=jnp.int32)
    group = jnp.minimum(sums.rank(padded_ends, column), len(sizes) - 1)
    offset = column - (padded_ends - fill_up(sizes))[group]
    row = jnp.where(offset < sizes[group], starts[group] + offset, m)
    gathered = jnp.pad(x, ((0, 1), (0, 0)))[row]
    grouped = jnp.arange(m) < sizes.sum()
    return [*cast(params, jnp.where(grouped[:, None], x, 0)), *cast(params, gathered.T)]


def _activation(params: Any, gated: bool) -> Callable[[jax.Array], jax.Array]:
    """Of x in float32: f(x), or of gate and up beside each other f(gate) up."""
    f = ACTIVATIONS[params.activation]
    if not gated:
        return f

    def product(x):
        gate, up = jnp.split(x, 2, axis=-1)
        return f(gate) * up

    return product


def activation_quantize(params, x, weights=None, *, gated=False):
    y = _activation(params, gated)(x.astype(jnp.float32))
    if weights is not None:
        y *= weights.astype(jnp.float32)[..., None]
    return cast(params, y)


def _sum_blocks(x: jax.Array) -> jax.Array:
    *outer, k = x.shape
    x = jnp.pad(x, [(0, 0)] * len(outer) + [(0, -k % BLOCK)])
    return x.reshape(*outer, x.shape[-1] // BLOCK, BLOCK).sum(axis=-1)


def activation_quantize_backward(params, x, dy, weights=None, *, gated=False):
    y, derivative = jax.vjp(_activation(params, gated), x.astype(jnp.float32))
    dy = dy.astype(jnp.float32)
    d_weights = _sum_blocks(dy * y)
    if weights is not None:
        dy *= weights.astype(jnp.float32)[..., None]
    return [*cast(params, *derivative(dy)), d_weights]
