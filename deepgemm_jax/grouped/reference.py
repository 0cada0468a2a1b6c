"""The grouped GEMMs in plain JAX: what runs where there is no kernel, and the tests' first oracle.

All work through tiles of rows of one group each, as a kernel does: work and memory are those of the
rows that there are, not of all rows for each group, however the groups' sizes are drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core import compat, sums
from ..gemm.reference import of_form

BLOCK = 128
LARGEST_TILE = 128


def accumulator(dtype: Any, *operands: Any) -> Any:
    """The dtype of sums for a result of this dtype, of products of operands of those."""
    dtype = jnp.dtype(dtype)
    inexact = [x for x in map(jnp.dtype, operands) if jnp.issubdtype(x, jnp.inexact)]
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        dtype = max(inexact, key=lambda x: x.itemsize)
    narrow = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else dtype


def _dot(x, y, axes, precision, dtype):
    """The product over an axis of each, in the accumulator's dtype for a result of `dtype`."""
    dtype = accumulator(dtype, x.dtype, y.dtype)
    # Narrow operands of a dot in a loop, laid out as XLA:CPU may choose, are more than it can do;
    # and those of tiles alone are few enough to widen.
    x, y = x.astype(dtype), y.astype(dtype)
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), precision=precision)


def _rows_by_tile(params: Any, ids: jax.Array, groups: int, n: int, product: Callable) -> list:
    """D from `product(rows, group)`, the rows of D that belong to a tile of rows of one group."""
    dtype = params.preferred_element_type
    (m,) = ids.shape
    if not m or not n or not groups:
        return [jnp.zeros((m, n), dtype)]
    # As many rows as a group has of them, so that few in a tile are of no use.
    tile = min(LARGEST_TILE, max(8, 1 << (m // groups).bit_length()))
    key = jnp.where(ids < 0, groups, ids)
    order = jnp.argsort(key)
    counts = jnp.zeros(groups + 1, jnp.int32).at[key].add(1)
    first_row = jnp.cumsum(counts) - counts
    tiles = -(-counts // tile)
    last_tile = jnp.cumsum(tiles[:groups])
    first_tile = jnp.cumsum(tiles) - tiles

    def one(number):
        group = jnp.minimum(sums.rank(last_tile, number), groups - 1)
        row = first_row[group] + (number - first_tile[group]) * tile + jnp.arange(tile)
        # Rows behind the group's last are computed too, and read by nobody.
        return product(jnp.take(order, row, mode="clip"), group)

    most_tiles = (m + min(groups, m) * (tile - 1)) // tile
    d = compat.each(one, jnp.arange(most_tiles, dtype=jnp.int32)).reshape(-1, n)
    rank = jnp.zeros(m, jnp.int32).at[order].set(jnp.arange(m, dtype=jnp.int32))
    place = (first_tile * tile - first_row)[key] + rank
    d = jnp.take(d, place, axis=0, mode="clip")
    return [jnp.where((ids < 0)[:, None], jnp.zeros((), dtype), d)]


def fp8_contiguous(params, a, a_scale, b, b_scale, ids, *, scales):
    dense = of_form(scales, False, False)

    def product(rows, group):
        return dense(params, a[rows], a_scale[rows], b[group], b_scale[group])[0]

    groups, n, _ = b.shape
    return _rows_by_tile(params, ids, groups, n, product)


def contiguous(params, a, b, ids, *, transpose_b):
    """The same in the dtypes that there are; `b` is [G, K, N] if `transpose_b`, else [G, N, K]."""
    n = b.shape[2 if transpose_b else 1]

    def product(rows, group):
        axes = 1, 0 if transpose_b else 1
        d = _dot(a[rows], b[group], axes, params.precision, params.preferred_element_type)
        return d.astype(params.preferred_element_type)

    return _rows_by_tile(params, ids, b.shape[0], n, product)


def fp8_masked(params, a, a_scale, b, b_scale, masked_m, *, scales):
    return of_form(scales, False, False)(params, a, a_scale, b, b_scale)


def masked(params, a, b, masked_m):
    dtype = params.preferred_element_type
    return [compat.each(lambda ab: _dot(ab[0], ab[1], (1, 1), None, dtype).astype(dtype), (a, b))]


def _sum_by_tile(
    params: Any,
    operands: Sequence[jax.Array],
    k: int,
    starts: jax.Array,
    ends: jax.Array,
    d: jax.Array,
    product: Callable,
) -> list:
    """D plus `product(k, valid)` of each tile of K, the tile's indices and which of them count."""
    groups = starts.size
    if k and groups:
        tile = min(LARGEST_TILE, k)
        tiles = -(-(ends - starts) // tile)
        last_tile = jnp.cumsum(tiles)

        def add(number, d):
            group = sums.rank(last_tile, number)
            index = starts[group] + (number - last_tile[group] + tiles[group]) * tile
            index += jnp.arange(tile)
            valid = index < ends[group]
            return d.at[group].add(product(jnp.minimum(index, k - 1), valid))

        (d, *_) = compat.vary_alike([d, *operands, starts])
        d = jax.lax.fori_loop(0, last_tile[-1], add, d)
    return [d.astype(params.preferred_element_type)]


def fp8_k_grouped(params, a, a_scale, b, b_scale, starts, ends, c=None):
    (m, k), n = a.shape, b.shape[0]

    def product(index, valid):
        def take(x, scale):
            values = jnp.take(x, index, 1).astype(jnp.float32)
            return jnp.where(valid, values * jnp.take(scale, index // BLOCK, 1), 0)

        return _dot(take(a, a_scale), take(b, b_scale), (1, 1), None, jnp.float32)

    d = jnp.zeros((starts.size, m, n), jnp.float32) if c is None else c.astype(jnp.float32)
    return _sum_by_tile(params, (a, a_scale, b, b_scale), k, starts, ends, d, product)


def k_grouped(params, a, b, starts, ends, c=None, *, axis):
    """The same in the dtypes that there are; K is dim `axis` of both operands."""
    k, m, n = a.shape[axis], a.shape[1 - axis], b.shape[1 - axis]
    dtype = accumulator(params.preferred_element_type, a.dtype, b.dtype)

    def product(index, valid):
        def take(x):
            valid_rows = jnp.expand_dims(valid, 1 - axis)
            return jnp.where(valid_rows, jnp.take(x, index, axis), jnp.zeros((), x.dtype))

        return _dot(take(a), take(b), (axis, axis), params.precision, dtype)

    d = jnp.zeros((starts.size, m, n), dtype) if c is None else c.astype(dtype)
    return _sum_by_tile(params, (a, b), k, starts, ends, d, product)
