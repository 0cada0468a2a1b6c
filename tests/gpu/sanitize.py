"""Every tile shape of the kernels once, for NVIDIA's compute-sanitizer to watch:

    XLA_PYTHON_CLIENT_PREALLOCATE=false compute-sanitizer --tool racecheck \\
        --kernel-name kernel_substring=kernel python tests/gpu/sanitize.py
"""

import jax
import jax.numpy as jnp

from deepgemm_jax import ScaledArray, fp8_gemm_nt, fp8_mqa_logits, indexer_topk
from deepgemm_jax._core.device import cuda_device
from deepgemm_jax.attention.config import logits_variants
from deepgemm_jax.gemm.config import Problem, candidates


def ones(rows: int, columns: int, block_rows: int) -> ScaledArray:
    scale = jnp.ones((-(-rows // block_rows), -(-columns // 128)))
    return ScaledArray(jnp.ones((rows, columns), jnp.float8_e4m3fn), scale)


m, n, k = 300, 264, 272
a, b = ones(m, k, 1), ones(n, k, 128)
for dtype in (jnp.bfloat16, jnp.float32):
    for c in (None, jnp.ones((m, n), dtype)):
        problem = Problem(m, n, k, 1, dtype, c is not None)
        for config, _ in candidates(problem, cuda_device()):
            d = fp8_gemm_nt(a, b, c, preferred_element_type=dtype, config=config)
            assert (jax.block_until_ready(d) == k + (c is not None)).all(), config

for logits_config in logits_variants(cuda_device()):
    heads = logits_config.heads
    fits = logits_config.columns // heads
    s, t = fits if logits_config.query_groups == 1 else 3 * fits, 333
    q, kv = (jnp.ones(shape, jnp.float8_e4m3fn) for shape in ((s, heads, 128), (t, 128)))
    ends = jnp.arange(s, dtype=jnp.int32) * 11
    logits = fp8_mqa_logits(q, (kv, jnp.ones(t)), jnp.ones((s, heads)), 0 * ends, ends)
    assert (jax.block_until_ready(logits.max(1))[1:] == 128 * heads).all(), logits_config

for logits_dtype in (jnp.float32, jnp.bfloat16):
    indices = indexer_topk(jnp.zeros((3, 7001), logits_dtype), 999)
    assert (jax.block_until_ready(indices) == jnp.arange(999)).all()
