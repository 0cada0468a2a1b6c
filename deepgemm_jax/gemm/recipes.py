"""Which elements of scaled operands share a scale: the shapes of the scales tell."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..scaled import BLOCK

Pair = tuple[jax.Array, jax.Array]  # data and scale

# Rows of A, rows of B and elements along K that share one; 0 is all of them. And how the kernels
# call it.
RECIPES: dict[tuple[int, ...], str] = {
    (1, BLOCK, BLOCK): "blocks",
    (1, 1, BLOCK): "channels",
    (1, 1, 0): "rows",
}


def scales_of(
    op: str,
    a: Pair,
    b: Pair,
    recipe: Sequence[int] | None,
    *,
    b_mn_major: bool = False,
) -> tuple[str, list[jax.Array]]:
    """Which scales A [..., M, K] and B [..., N, K], or [..., K, N] if it is MN-major, have; and
    both data and scales as an op takes them, those of rows without K's dim."""
    (a_data, a_scale), (b_data, b_scale) = a, b
    wanted = _shapes(a_data.shape, b_data.shape, b_mn_major)
    fitting = [
        found
        for found, (of_a, of_b) in wanted.items()
        if a_scale.shape in of_a and b_scale.shape in of_b
    ]
    # Where several fit they say the same; where none does, the first one's op knows why.
    chosen = (*fitting, *RECIPES)[0] if recipe is None else tuple(recipe)
    shapes = f"{a_scale.shape} and {b_scale.shape}"
    if chosen not in (fitting or RECIPES):
        known = " or ".join(map(str, fitting or RECIPES))
        raise ValueError(f"{op}: recipe is {recipe}, wanted {known} for scales of shapes {shapes}")
    if chosen == (1, 1, 0):
        if not fitting:
            raise ValueError(f"{op}: scales have shapes {shapes}, wanted one for each row or one")
        n = b_data.shape[-1 if b_mn_major else -2]
        a_scale = jnp.broadcast_to(a_scale[..., 0], a_data.shape[:-1])
        b_scale = b_scale.reshape(*b_scale.shape[:-2], -1)
        b_scale = jnp.broadcast_to(b_scale, (*b_data.shape[:-2], n))
    return RECIPES[chosen], [a_data, a_scale, b_data, b_scale]


def _shapes(a: tuple[int, ...], b: tuple[int, ...], b_mn_major: bool) -> dict:
    """Of each recipe the shapes that scales of such data may have."""
    if min(len(a), len(b)) < 2:
        return {}
    *a_batch, m, k = a
    *b_batch, n, _ = (*b[:-2], b[-1], b[-2]) if b_mn_major else b
    blocks = -(-k // BLOCK)

    def of_b(rows: int, along_k: int) -> tuple[int, ...]:
        return (*b_batch, *((along_k, rows) if b_mn_major else (rows, along_k)))

    by_blocks = [(*a_batch, m, blocks)]
    return {
        (1, BLOCK, BLOCK): (by_blocks, [of_b(-(-n // BLOCK), blocks)]),
        (1, 1, BLOCK): (by_blocks, [of_b(n, blocks)]),
        (1, 1, 0): ([(*a_batch, m, 1), (*a_batch, 1, 1)], [of_b(n, 1), of_b(1, 1)]),
    }
