"""Which rows are whose. All of it is computed on the device, and defined for any numbers."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from .._core import compat, sums
from .._core.op import logger

PADDING = -1  # the id of a row of no group


def report(op: str, what: str, wrong: jax.Array) -> None:
    """Where ``DEEPGEMM_JAX_DEBUG_GROUPS`` is set, to anything but 0, as a call is traced, each run
    of it logs a warning if numbers that tell the groups had to be clamped."""
    if os.environ.get("DEEPGEMM_JAX_DEBUG_GROUPS", "") not in ("", "0"):
        jax.debug.callback(functools.partial(_warn, op, what), wrong.sum())


def _warn(op: str, what: str, count: Any) -> None:
    if count:
        logger.warning("%s: %s: %d of them", op, what, count)


def spans_of_offsets(offsets: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """First row and end of each group from G + 1 offsets; one whose end is before its start is
    empty."""
    offsets = jax.lax.cummax(sums.clamp(offsets, rows))
    return offsets[:-1], offsets[1:]


def shard(
    starts: jax.Array, ends: jax.Array, rows: int, first: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The spans of `count` groups from the group `first` on; a group that there is not is empty."""
    groups = starts.shape[-1]
    index = sums.clamp(first, groups, least=-count) + jnp.arange(count, dtype=jnp.int32)
    before, behind = index < 0, index >= groups

    def take(x):
        x = jnp.take(x, index, axis=-1, mode="clip")
        return jnp.where(before, 0, jnp.where(behind, rows, x))

    return take(starts), take(ends)


def ids(starts: jax.Array, ends: jax.Array, rows: int) -> jax.Array:
    """The group of each row, for the spans of groups that follow each other."""
    row = jnp.arange(rows, dtype=jnp.int32)
    if not ends.size:
        return jnp.full_like(row, PADDING)
    group = sums.rank(ends, row)
    found = (group < ends.size) & (row >= jnp.take(starts, group, mode="clip"))
    return jnp.where(found, group, PADDING)


def row_ids(op: str, rows: int, groups: int, m_indices: Any) -> jax.Array:
    """The group of each row; -1 where there is no such group."""
    m_indices = integers(op, "m_indices", m_indices, (rows,))
    # Clamped before they are compared: -1 as an unsigned number is a large one.
    group = sums.clamp(m_indices, groups, least=-2)
    wrong = (group < -1) | (group == groups)
    report(op, f"m_indices that are no group's of {groups} nor -1", wrong)
    return jnp.where((group < 0) | wrong, PADDING, group)


def row_spans(
    op: str, rows: int, groups: int | None, group_sizes: Any, group_offsets: Any
) -> tuple[jax.Array, jax.Array]:
    """First row and end of each group from the one spelling that is not None."""
    if group_offsets is None:
        wanted = None if groups is None else (groups,)
        sizes = compat.whole(integers(op, "group_sizes", group_sizes, wanted))
        report_sizes(op, sizes, rows)
        return sums.spans(sizes, rows)
    wanted = None if groups is None else (groups + 1,)
    offsets = compat.whole(integers(op, "group_offsets", group_offsets, wanted))
    if not offsets.size:
        raise ValueError(f"{op}: group_offsets has shape (0,), wanted one more than groups")
    wide = sums.widen(offsets)
    report(op, f"group_offsets outside of 0 to {rows}", (wide < 0) | (wide > rows))
    report(op, "group_offsets less than the one before", wide[1:] < wide[:-1])
    return spans_of_offsets(offsets, rows)


def report_sizes(op: str, sizes: jax.Array, rows: int) -> None:
    report(op, "negative group_sizes", sizes < 0)
    total = jnp.maximum(sizes, 0).sum(-1, dtype=jnp.float32)
    report(op, f"group_sizes that add up to more than the {rows} rows", total > rows)


def integers(op: str, name: str, x: Any, shape: tuple[int, ...] | None) -> jax.Array:
    """The array, if it is one of integers and of this shape, or of one dim where that is None."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, wanted integers")
    if x.ndim != 1 if shape is None else x.shape != shape:
        raise ValueError(
            f"{op}: {name} has shape {x.shape}, wanted {'1 dimension' if shape is None else shape}"
        )
    return x


def offset(op: str, group_offset: Any) -> jax.Array:
    """The group of the first matrix, an integer, [1] or scalar."""
    group_offset = jnp.asarray(group_offset)
    wanted = group_offset.shape if group_offset.ndim == 0 else (1,)
    return integers(op, "group_offset", group_offset, wanted).reshape(())


def check_shard(op: str, which: str, matrices: int, groups: int) -> None:
    """Raises a ValueError if there are matrices that are no group's, whatever the offset."""
    if matrices > groups:
        raise ValueError(
            f"{op}: {which} has {matrices} groups, wanted no more than the {groups} of group_sizes"
        )


def exactly_one(op: str, **spellings: Any) -> None:
    given = [name for name, value in spellings.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{op}: {' and '.join(given) or 'nothing'} given to say which rows are whose, wanted "
            f"exactly one of {', '.join(spellings)}"
        )
