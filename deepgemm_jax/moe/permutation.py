"""Tokens to rows of groups, and back.

A token has `k` slots, each with the group that it is sent to: an expert, or a shard of the experts.
Rows are the slots in the order of their groups, and within a group in their own order. A sort of
the slots' groups is all that it takes; no array has more than a row for each slot.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._core import compat, sums
from ..scaled import ScaledArray, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Permutation:
    """Which row each slot has, and which slot each row.

    Attributes:
      row: int32 [T, k], the row of each slot; the number of rows for a slot that has none.
      slot: int32 [R], the slot t k + j of each row; T k for a row that is none's.
      group_sizes: int32 [G], the rows of each group.

    Where a mesh's axes are Explicit, a row may come from anywhere: rows are whole on each device,
    and tokens are gathered for them. `row` is divided as the groups it is made of, and so are the
    sums that `unpermute` makes.
    """

    row: jax.Array
    slot: jax.Array
    group_sizes: jax.Array

    @classmethod
    def of(
        cls, groups: Any, num_groups: int, rows: int | None = None, capacity: int | None = None
    ) -> "Permutation":
        """Puts slots in the order of their groups.

        Args:
          groups: integers [T, k]; a slot whose group is out of range has no row.
          num_groups: how many groups there are.
          rows: how many rows to make room for, T k if None. What is beyond has no row.
          capacity: None for groups that follow each other; or how many rows each group has of its
            own, used or not. A slot that finds its group full has no row.

        Raises:
          TypeError: groups that are no integers.
          ValueError: groups of another number of dims; negative numbers of groups or rows.

        Example:

            >>> import jax.numpy as jnp
            >>> from deepgemm_jax.moe import Permutation
            >>> plan = Permutation.of(jnp.array([[2, 0], [0, 1], [2, 3]]), 3)
            >>> print(plan.row.tolist(), plan.slot, plan.group_sizes)
            [[3, 0], [1, 2], [4, 6]] [1 2 3 0 4 6] [2 1 2]
        """
        groups = jnp.asarray(groups)
        if not jnp.issubdtype(groups.dtype, jnp.integer):
            raise TypeError(f"Permutation.of: groups has dtype {groups.dtype}, wanted integers")
        if groups.ndim != 2:
            raise ValueError(f"Permutation.of: groups has shape {groups.shape}, wanted [T, k]")
        for name, number in {"num_groups": num_groups, "rows": rows, "capacity": capacity}.items():
            if number is not None and number < 0:
                raise ValueError(f"Permutation.of: {name} is {number}, wanted at least 0")
        groups = compat.whole(groups)
        slots = groups.size
        if capacity is not None:
            rows = num_groups * capacity
        rows = slots if rows is None else rows
        key = jnp.where((groups >= 0) & (groups < num_groups), groups, num_groups)
        key = key.reshape(-1).astype(jnp.int32)
        place = jnp.arange(slots, dtype=jnp.int32)
        key, order = jax.lax.sort(_whole(key, place), num_keys=1)
        group_sizes = sums.sizes_of(groups, num_groups)
        if capacity is None:
            if rows < slots:
                starts, ends = sums.spans(group_sizes, rows)
                group_sizes = ends - starts
            row = jnp.where(key < num_groups, jnp.minimum(place, rows), rows)
            slot = jnp.where(key < num_groups, order, slots)[:rows]
            slot = jnp.pad(slot, (0, rows - len(slot)), constant_values=slots)
        else:
            starts, _ = sums.spans(group_sizes, slots)
            group_sizes = jnp.minimum(group_sizes, capacity)
            rank = place - jnp.take(starts, key, mode="clip")
            row = jnp.where((key < num_groups) & (rank < capacity), key * capacity + rank, rows)
            slot = jnp.full_like(key, slots, shape=rows).at[row].set(order, mode="drop")
        row_of = jnp.zeros_like(row).at[order].set(row, unique_indices=True)
        return cls(compat.divided_as(row_of.reshape(groups.shape), groups), slot, group_sizes)

    def of_slots(self) -> "Permutation":
        """The same, of T k tokens that have a slot each."""
        return dataclasses.replace(self, row=self.row.reshape(-1)[:, None])


compat.register_serialization(Permutation)


def permute(x: Any, permutation: Permutation) -> Any:
    """Gives each row the token that its slot belongs to; zeros to rows that are none's.

    Args:
      x: [T, ...], or a `ScaledArray` of [T, H] with scales of one row each.
      permutation: which row is whose.

    Returns:
      [R, ...] of x's dtype, or a `ScaledArray` whose data and scales were moved together.

    Raises:
      ValueError: as many tokens as the permutation has not.

    An array of floats has a gradient: it is `unpermute` of the result's, no scatter.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax.moe import Permutation, permute, unpermute
        >>> plan = Permutation.of(jnp.array([[2, 0], [0, 1], [2, -1]]), 3)
        >>> rows = permute(jnp.array([[1.0], [2.0], [3.0]]), plan)
        >>> print(rows[:, 0], unpermute(rows, plan)[:, 0])
        [1. 2. 2. 1. 3. 0.] [2. 4. 3.]
    """
    x, permutation = _whole(_rows("permute", "x", x, permutation.row.shape[0]), permutation)
    if isinstance(x, ScaledArray):
        return jax.tree.map(lambda leaf: _gather(leaf, permutation), x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return _gather(x, permutation)
    return _permute(x, permutation)


def unpermute(rows: Any, permutation: Permutation, weights: Any = None) -> jax.Array:
    r"""Adds up the rows of each token's slots, in float32.

    $$y_t = \sum_j w_{tj}\, \text{rows}_{\text{row}(t, j)}$$

    Args:
      rows: float [R, ...], or a `ScaledArray` of [R, H] with scales of one row each.
      permutation: which row is whose.
      weights: None, or float [T, k].

    Returns:
      float32 [T, ...]. A slot that has no row adds nothing, and rows that are none's may hold
      anything, NaN too.

    Raises:
      ValueError: rows or weights of other shapes than the permutation's.

    Arrays have a gradient. Example: see `permute`.
    """
    rows = _rows("unpermute", "rows", rows, len(permutation.slot))
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.shape != permutation.row.shape:
            raise ValueError(
                f"unpermute: weights has shape {weights.shape}, wanted {permutation.row.shape}"
            )
    of_tokens = permutation.row
    rows, permutation, weights = _whole(rows, permutation, weights)
    if isinstance(rows, ScaledArray):
        y = _sum(rows, permutation, weights)
    else:
        if weights is not None:
            # Of weights that are rows' own, both gradients are products of what rows have.
            own = permute(weights.astype(jnp.float32).reshape(-1), permutation.of_slots())
            own = own.reshape(-1, *[1] * (rows.ndim - 1))
            used = (permutation.slot < permutation.row.size).reshape(own.shape)
            rows = jnp.where(used, rows, 0).astype(jnp.float32) * own
        y = _unpermute(rows, permutation)
    return compat.rows_divided_as(y, of_tokens)


def _rows(op: str, name: str, x: Any, rows: int) -> Any:
    """The operand, an array or a `ScaledArray`, if it and its scales have so many rows."""
    x = ScaledArray(*unpack(op, name, x)) if isinstance(x, (ScaledArray, tuple)) else jnp.asarray(x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    if any(shape[:1] != (rows,) for shape in shapes):
        found = " with scales ".join(map(str, shapes))
        raise ValueError(f"{op}: {name} has shape {found}, wanted {rows} rows")
    return x


def vary_alike(*trees: Any) -> Any:
    """The same, cast to vary along each mesh axis that any leaf varies along."""
    leaves, tree = jax.tree.flatten(trees)
    return jax.tree.unflatten(tree, compat.vary_alike(leaves))


def _whole(*trees: Any) -> Any:
    """These, and all of each on every device if mesh axes are part of types: a row is anywhere."""
    return jax.tree.map(lambda leaf: compat.whole(leaf, leaf.ndim), vary_alike(*trees))


def _gather(x: jax.Array, permutation: Permutation) -> jax.Array:
    token = permutation.slot // permutation.row.shape[1]
    # XLA moves element by element: four at once, FP8 takes a third of the time.
    in_word = 4 // x.dtype.itemsize
    if x.ndim != 2 or in_word < 2 or x.shape[1] % in_word:
        return _take(x, token)
    words = jax.lax.bitcast_convert_type(
        x.reshape(len(x), x.shape[1] // in_word, in_word), jnp.int32
    )
    rows = jax.lax.bitcast_convert_type(_take(words, token), x.dtype)
    return rows.reshape(len(token), x.shape[1])


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _sum(rows: Any, permutation: Permutation, weights: jax.Array | None = None) -> jax.Array:
    # Slot by slot: in one pass over the rows, where XLA keeps no copy of any.
    total = jnp.zeros((), jnp.float32)
    for j in range(permutation.row.shape[1]):
        of_slot = jax.tree.map(lambda leaf, j=j: _take(leaf, permutation.row[:, j]), rows)
        if isinstance(rows, ScaledArray):
            of_slot = of_slot.dequantize()
        of_slot = of_slot.astype(jnp.float32)
        if weights is not None:
            of_slot *= weights[:, j].astype(jnp.float32)[:, None]
        total += of_slot
    return total


@jax.custom_vjp
def _permute(x: jax.Array, permutation: Permutation) -> jax.Array:
    return _gather(x, permutation)


@jax.custom_vjp
def _unpermute(rows: jax.Array, permutation: Permutation) -> jax.Array:
    return _sum(rows, permutation)


_permute.defvjp(
    lambda x, permutation: (_gather(x, permutation), permutation),
    lambda permutation, d_rows: (_sum(d_rows, permutation).astype(d_rows.dtype), None),
)
_unpermute.defvjp(
    lambda rows, permutation: (_sum(rows, permutation), (permutation, rows[:0])),
    lambda kept, d: (_gather(d.astype(kept[1].dtype), kept[0]), None),
)
