"""Which elements of scaled operands share a scale: the shapes of the scales tell."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..scaled import BLOCK

Pair = tuple[jax.Array, jax.Array]  # data and scale

# Rows of A, rows of B and elements along K that share one; 0 is all of them. And what kernels call
# such scales.
RECIPES: dict[tuple[int, ...], str] = {
    (1, BLOCK, BLOCK): "blocks",
    (1, 1, BLOCK): "channels",
    (1, 1, 0): "rows",
}


def scales_of(
    op: str,
    a: Pair,
    b: Pair,
    recipe: Sequence[int] | None = None,
    *,
    a_mn_major: bool = False,
    b_mn_major: bool = False,
) -> str:
    """What kernels call the scales of A [..., M, K] and B [..., N, K], or with these dims the other
    way round where they are MN-major; ValueError if there is no such recipe, or another is given.
    """
    (a_data, a_scale), (b_data, b_scale) = a, b
    if min(a_data.ndim, b_data.ndim) < 2:
        return "blocks"  # whose op says that there are dims missing
    k = a_data.shape[-2 if a_mn_major else -1]
    wanted = {
        which: (
            _shapes(a_data, a_mn_major, which[0], which[2], k),
            _shapes(b_data, b_mn_major, which[1], which[2], k),
        )
        for which in RECIPES
    }
    if recipe is not None:
        if tuple(recipe) not in RECIPES:
            raise ValueError(f"{op}: recipe is {recipe}, wanted {' or '.join(map(str, RECIPES))}")
        wanted = {tuple(recipe): wanted[tuple(recipe)]}
    for which, (of_a, of_b) in wanted.items():
        if a_scale.shape in of_a and b_scale.shape in of_b:
            return RECIPES[which]  # Where several fit they say the same.
    known = "; or ".join(
        f"{' or '.join(map(str, of_a))} and {' or '.join(map(str, of_b))} for recipe {which}"
        for which, (of_a, of_b) in wanted.items()
    )
    raise ValueError(
        f"{op}: a.scale and b.scale have shapes {a_scale.shape} and {b_scale.shape}, wanted {known}"
    )


def _shapes(data: jax.Array, mn_major: bool, rows: int, along_k: int, k: int) -> list:
    """Those that scales may have of which one serves so many rows and elements along K."""
    count = data.shape[-1 if mn_major else -2]
    ends = [(-(-count // rows), -(-k // along_k))] if along_k else [(count, 1), (1, 1)]
    return [(*data.shape[:-2], *end[:: -1 if mn_major else 1]) for end in ends]


def of_rows(scale: jax.Array, rows: Sequence[int]) -> jax.Array:
    """One scale for each row [..., M], of those of the recipe (1, 1, 0)."""
    return jnp.broadcast_to(scale.reshape(*scale.shape[:-2], -1), rows)
