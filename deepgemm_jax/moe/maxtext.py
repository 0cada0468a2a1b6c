"""MaxText's grouped GEMM."""

from typing import Any

import jax

from ..grouped import ragged_dot
from ..training import grouped_linear


def grouped_gemm(
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: Any = None,
    *,
    recipe: Any = "fp8",
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` in FP8, with gradients: what MaxText's `sparse_matmul` calls.

    Args:
      lhs: bfloat16 or float32 [M, K], rows sorted by group.
      rhs: bfloat16 or float32 [G, K, N].
      group_sizes: integers [G].
      precision: for the arguments' sake: the recipe says in which precision is multiplied.
      preferred_element_type: the result's dtype, None for that of `lhs`, to which the result is
        rounded in any case unless `recipe` is None.
      group_offset: None; or the group that the first of `rhs` belongs to, which may then be fewer
        than `group_sizes`.
      recipe: as `training.grouped_linear` takes it; None multiplies in the operands' dtypes, as
        `ragged_dot` does.
      implementation: "cuda" for the kernels, "xla" for plain JAX, None for kernels where there are
        some and plain JAX elsewhere.

    Returns:
      [M, N]. Rows of no group are zero.

    Example: `examples/maxtext_moe.py` puts it into such a layer.
    """
    if recipe is None:
        return ragged_dot(
            lhs,
            rhs,
            group_sizes,
            precision,
            preferred_element_type,
            group_offset,
            implementation=implementation,
        )
    y = grouped_linear(
        lhs,
        rhs,
        group_sizes,
        recipe=recipe,
        group_offset=group_offset,
        implementation=implementation,
    )
    return y if preferred_element_type is None else y.astype(preferred_element_type)
