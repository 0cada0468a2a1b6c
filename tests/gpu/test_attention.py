"""What only a GPU shows of the indexer's kernels. Their values are tested in tests/attention, on a
GPU too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import assert_small_difference, logits, random_problem
from oracles import FLOAT8, assert_close, put

from deepgemm_jax import fp8_mqa_logits, indexer_topk
from deepgemm_jax._core.device import cuda_device
from deepgemm_jax.attention.config import choose_logits, logits_variants

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_config_gives_the_logits(dtype):
    for config in logits_variants(cuda_device()):
        fits = config.columns // config.heads
        # So many queries that it is chosen.
        s = fits if config.query_groups == 1 else 5 * fits + 1
        heads = config.heads - (1 if fits == 1 else 4)
        assert choose_logits(s, heads, cuda_device()) == config
        problem = random_problem(s, s, 1111, heads, 128)
        found = fp8_mqa_logits(*put(problem.arguments, "cuda"), logits_dtype=dtype)
        assert_close(found, logits(problem), "cuda")
        assert_small_difference(found, logits(problem))


@pytest.mark.parametrize("width", [None, 300])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_element_is_written(dtype, width):
    s, t = 37, 611
    problem = random_problem(0, s, t)
    call = functools.partial(fp8_mqa_logits, max_seqlen_k=width, logits_dtype=dtype)
    operands = put(problem.arguments, "cuda")
    compiled = jax.jit(call).lower(*operands).compile()
    for poison in (np.nan, 1e30):
        # XLA gives out last what it got back last.
        jax.block_until_ready([put(jnp.full((s, width or t), poison, dtype), "cuda")] * 3)
        assert_close(compiled(*operands), logits(problem, width), "cuda")


def test_many_tiles_of_many_queries():
    """Work that no CTA has a whole block of queries of, and CTAs that have several."""
    for s, t in ((3, 50_001), (3000, 700), (1000, 5000)):
        rng = np.random.default_rng(s)
        q = rng.normal(size=(s, 64, 128)).astype(FLOAT8)
        kv = rng.normal(size=(t, 128)).astype(FLOAT8), rng.lognormal(size=t).astype(np.float32)
        start = rng.integers(-5, t // 2, s).astype(np.int32)
        end = (start + rng.integers(-10, t, s)).astype(np.int32)
        weights = rng.normal(size=(s, 64)).astype(np.float32)
        operands = put((q, kv, weights, start, end), "cuda")
        found = fp8_mqa_logits(*operands)
        wanted = fp8_mqa_logits(*operands, implementation="xla")
        np.testing.assert_array_equal(jnp.isneginf(found), jnp.isneginf(wanted))
        seen = jnp.isfinite(wanted)
        size = jnp.sqrt(jnp.where(seen, wanted, 0) ** 2).mean()
        assert jnp.where(seen, abs(found - wanted), 0).max() < 0.1 * size


def test_topk_of_inputs_takes_a_gibibyte_at_most():
    s, t, h, d = 4096, 131072, 64, 128
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.default_device(jax.local_devices(backend="cuda")[0]):
        q, kv = (
            jax.random.normal(key, shape, jnp.bfloat16).astype(FLOAT8)
            for key, shape in zip(keys[:2], ((s, h, d), (t, d)), strict=True)
        )
        weights = jax.random.normal(keys[2], (s, h))
        inputs = q, (kv, jnp.ones(t)), weights, jnp.zeros(s, jnp.int32), jnp.full(s, t)
    top = jax.jit(lambda inputs: indexer_topk(inputs, 2048, return_scores=True))
    compiled = top.lower(inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**30
    indices, scores = compiled(inputs)
    rows = np.arange(0, s, 512)
    some = q[rows], inputs[1], weights[rows], inputs[3][rows], inputs[4][rows]
    wanted = jax.lax.top_k(fp8_mqa_logits(*some), 2048)
    np.testing.assert_array_equal(scores[rows], wanted[0])
    np.testing.assert_array_equal(indices[rows], wanted[1])
