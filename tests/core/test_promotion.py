"""Programs may forbid jax.numpy to promote dtypes and ranks, as JAX's own functions let them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from deepgemm_jax import (
    ScaledArray,
    clean_logits,
    fp8_gemm_nt,
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_paged_mqa_logits_metadata,
    indexer_topk,
    k_grouped_bf16_gemm_tn_contiguous,
    m_grouped_bf16_gemm_nt_masked,
    m_grouped_fp8_gemm_nt_contiguous,
    mqa_logits,
    per_block_cast_to_fp8,
    per_token_cast_to_fp8,
    quantize_transpose,
    ragged_dot,
    swiglu_quantize_backward,
)
from deepgemm_jax.moe import MoEParams, moe_layer, route

X, W = jnp.ones((24, 256)), jnp.ones((3, 256, 128))
SIZES = jnp.array([4, 10, 6])
FEW = jnp.ones((3, 8, 16), jnp.bfloat16)

Q, KEYS, WEIGHTS = jnp.ones((3, 8, 32)), jnp.ones((40, 32)), jnp.ones((3, 8))
SEEN = jnp.array([0, 0, 2]), jnp.array([1, 40, 14])
FP8 = Q.astype(jnp.float8_e4m3fn), (KEYS.astype(jnp.float8_e4m3fn), jnp.ones(40)), WEIGHTS, *SEEN


def paged():
    cache = jnp.zeros((5, 64, 1, 36), jnp.uint8)
    lengths = jnp.array([66, 1])
    q = jnp.ones((2, 2, 8, 32), jnp.float8_e4m3fn)
    table = jnp.array([[2, 0], [1, -1]])
    logits = fp8_paged_mqa_logits(q, cache, jnp.ones((4, 8)), lengths, table, None, 128)
    return logits, get_paged_mqa_logits_metadata(lengths, 64, num_sms=3)


def contiguous():
    b = ScaledArray(jnp.ones((3, 128, 256), jnp.float8_e4m3fn), jnp.ones((3, 1, 2)))
    return m_grouped_fp8_gemm_nt_contiguous(per_token_cast_to_fp8(X), b, group_sizes=SIZES)


def mixture(layout):
    params = MoEParams.init(jax.random.key(0), hidden=256, intermediate=128, experts=4)
    router = functools.partial(route, top_k=2, n_group=2, topk_group=1)
    return moe_layer(X, params, router, valid=jnp.arange(24) < 20, layout=layout)


CALLS = {
    "dense": lambda: fp8_gemm_nt(per_token_cast_to_fp8(X), per_block_cast_to_fp8(X)),
    "contiguous": contiguous,
    "masked": lambda: m_grouped_bf16_gemm_nt_masked(FEW, FEW, SIZES, zero_fill=True),
    "masked_by_booleans": lambda: m_grouped_bf16_gemm_nt_masked(
        FEW, FEW, jnp.ones((3, 8), bool), zero_fill=True
    ),
    "k_grouped": lambda: k_grouped_bf16_gemm_tn_contiguous(
        X.astype(jnp.bfloat16), X.astype(jnp.bfloat16), group_sizes=SIZES
    ),
    "ragged_dot": lambda: jax.grad(lambda *x: ragged_dot(*x, SIZES).sum(), (0, 1))(X, W),
    "ragged_dot_of_a_shard": lambda: ragged_dot(X, W[:2], SIZES, group_offset=1),
    "quantize_transpose": lambda: quantize_transpose(X, SIZES),
    "swiglu": lambda: swiglu_quantize_backward(X, X[:, :128], jnp.ones(24)),
    "layout": lambda: get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
        jnp.ones((6, 16)), jnp.array([256, 512])
    ),
    "mqa_logits": lambda: fp8_mqa_logits(*FP8),
    "mqa_logits_compressed": lambda: fp8_mqa_logits(*FP8, max_seqlen_k=16),
    "mqa_logits_gradient": lambda: jax.grad(lambda k: mqa_logits(Q, k, WEIGHTS, *SEEN).sum())(KEYS),
    "paged": paged,
    "clean_logits": lambda: clean_logits(jnp.ones((3, 40)), *SEEN),
    "mixture": lambda: mixture("contiguous"),
    "masked_mixture": lambda: mixture("masked"),
    "topk": lambda: indexer_topk(FP8, 4, return_scores=True),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_promoted(call):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.jit(CALLS[call])()
