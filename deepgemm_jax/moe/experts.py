"""The experts of one device: what lies between their tokens and their sums.

Weights that are arrays are trained: `training.grouped_mlp` multiplies by them, in FP8 or bfloat16,
and has a gradient. Weights that are `ScaledArray`s are served: tokens are quantised once, and are
moved and multiplied as they are, with no gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..grouped import (
    m_grouped_bf16_gemm_nt_masked,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from ..quantize import per_token_cast_to_fp8, prepare_weight, swiglu_quantize
from ..scaled import ScaledArray
from ..training import Recipe, grouped_mlp
from .permutation import Permutation, permute, unpermute

Weight = Any  # jax.Array | ScaledArray


def gate_up_matrix(w: Weight) -> Weight:
    """[G, K, 2, I] as one matrix, [G, K, 2 I]; scaled, [G, 2, I, K] as [G, 2 I, K]."""
    axis = 1 if isinstance(w, ScaledArray) else 2
    return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), w)


def mlp(
    x: Any,
    w_gate_up: Weight,
    w_down: Weight,
    group_sizes: jax.Array,
    router_weights: jax.Array | None,
    *,
    recipe: Any,
    implementation: str | None,
) -> jax.Array:
    """Rows of groups that follow each other, through the groups' gated MLPs."""
    if not isinstance(w_down, ScaledArray):
        return grouped_mlp(
            x,
            gate_up_matrix(w_gate_up),
            w_down,
            group_sizes,
            router_weights,
            recipe=recipe,
            implementation=implementation,
        )
    gemm = functools.partial(
        m_grouped_fp8_gemm_nt_contiguous, group_sizes=group_sizes, implementation=implementation
    )
    h = gemm(scaled(x, implementation), gate_up_matrix(w_gate_up))
    return gemm(swiglu_quantize(h, router_weights, implementation=implementation), w_down)


def masked_mlp(
    x: Any,
    w_gate_up: Weight,
    w_down: Weight,
    group_sizes: jax.Array,
    router_weights: jax.Array,
    *,
    recipe: Any,
    implementation: str | None,
) -> jax.Array:
    """Rows [G C, K], of which each group has C, the first `group_sizes[g]` of them used."""
    groups = len(group_sizes)

    def by_group(x):
        return jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), x)

    def of_all(x):
        return x.reshape(-1, x.shape[-1])

    w_gate_up = gate_up_matrix(w_gate_up)
    if not isinstance(w_down, ScaledArray) and Recipe.of("moe_layer", recipe).forward == "fp8":
        w_gate_up, w_down = (
            prepare_weight(w, layout="kn", implementation=implementation)
            for w in (w_gate_up, w_down)
        )
    if isinstance(w_down, ScaledArray):
        x = by_group(scaled(x, implementation))
        h = m_grouped_fp8_gemm_nt_masked(x, w_gate_up, group_sizes, implementation=implementation)
        y = by_group(swiglu_quantize(of_all(h), router_weights, implementation=implementation))
        y = m_grouped_fp8_gemm_nt_masked(y, w_down, group_sizes, implementation=implementation)
        return of_all(y)
    x, w_gate_up, w_down = (w.astype(jnp.bfloat16) for w in (x, w_gate_up, w_down))
    h = m_grouped_bf16_gemm_nt_masked(
        by_group(x), jnp.swapaxes(w_gate_up, 1, 2), group_sizes, implementation=implementation
    )
    gate, up = jnp.split(of_all(h).astype(jnp.float32), 2, axis=-1)
    y = (jax.nn.silu(gate) * up * router_weights[:, None]).astype(jnp.bfloat16)
    return of_all(
        m_grouped_bf16_gemm_nt_masked(
            by_group(y), jnp.swapaxes(w_down, 1, 2), group_sizes, implementation=implementation
        )
    )


def scaled(x: Any, implementation: str | None) -> ScaledArray:
    if isinstance(x, ScaledArray):
        return x
    return per_token_cast_to_fp8(x, implementation=implementation)


def local_experts(
    x: Any,
    experts: jax.Array,
    weights: jax.Array,
    w_gate_up: Weight,
    w_down: Weight,
    *,
    rows: int,
    layout: str,
    recipe: Any,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """What the experts here make of tokens [T, H], and how many slots they had room for.

    `experts`, [T, k], are counted from the first one here; one out of range is elsewhere. There is
    room for `rows` slots or, masked, for that many of each expert.
    """
    if isinstance(w_down, ScaledArray):
        x = scaled(x, implementation)
    masked = layout == "masked"
    plan = Permutation.of(experts, w_down.shape[0], rows, capacity=rows if masked else None)
    of_rows = permute(weights.reshape(-1), plan.of_slots())
    operands = permute(x, plan), w_gate_up, w_down, plan.group_sizes, of_rows
    compute = masked_mlp if masked else mlp
    y = compute(*operands, recipe=recipe, implementation=implementation)
    return unpermute(y, plan), plan.group_sizes.sum(dtype=jnp.int32)
