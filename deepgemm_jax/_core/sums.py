"""Sizes that only the device knows, and their sums."""

import jax
import jax.numpy as jnp


def sizes_of(groups: jax.Array, count: int) -> jax.Array:
    """How many of `groups` [...] are each of 0 to `count` − 1, int32 [count]."""
    # Compared and added up in one kernel, which is faster than adding one by one in memory.
    dims = range(1, groups.ndim + 1)
    found = groups[None] == jnp.expand_dims(jnp.arange(count), dims)
    return found.sum(dims, dtype=jnp.int32)


def spans(sizes: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """First row and end of each group, for sizes [..., G] of groups that follow each other.

    A negative size counts as 0. Where the sizes add up to more than `most` < 2³⁰, the groups end
    with that.
    """
    sizes = clamp(sizes, most)
    axis = sizes.ndim - 1
    if sizes.shape[axis] * most < 2**31:
        # Groups are few, and this is one kernel of XLA's, where a running sum of many is three.
        group = jnp.arange(sizes.shape[axis])
        up_to = jnp.expand_dims(group[None] <= group[:, None], range(axis))
        ends = jnp.where(up_to, sizes[..., None, :], 0).sum(-1, dtype=jnp.int32)
        return jnp.minimum(ends - sizes, most), jnp.minimum(ends, most)
    # All together may not fit. Where each step is cut, no later one does harm; but XLA fuses the
    # steps to code that grows with each, which takes it seconds.
    ends = jax.lax.associative_scan(lambda x, y: jnp.minimum(x + y, most), sizes, axis=axis)
    return jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends[..., :-1]], axis), ends


def rank(values: jax.Array, x: jax.Array) -> jax.Array:
    """How many of `values` [S] each x is not below, int32: `jnp.searchsorted(side="right")`, which
    does not trace where a mesh is partly manual."""
    # All are compared, which XLA does as it counts: bisection is a loop of kernels on a GPU.
    values = jnp.expand_dims(values, range(x.ndim))
    return (values <= x[..., None]).sum(-1, dtype=jnp.int32)


def clamp(x: jax.Array, most: int, least: int = 0) -> jax.Array:
    """As int32, between the bounds."""
    # Unsigned integers have no bound below 0.
    x = widen(x)
    x = (
        jnp.minimum(x, most)
        if jnp.issubdtype(x.dtype, jnp.unsignedinteger)
        else jnp.clip(x, least, most)
    )
    return x.astype(jnp.int32)


def widen(x: jax.Array) -> jax.Array:
    """In no fewer than 32 bits, which hold any bound."""
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.int32)
