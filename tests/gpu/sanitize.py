"""Every variant of the kernels once, for NVIDIA's compute-sanitizer to watch:

    XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=.:tests compute-sanitizer --tool racecheck \\
        --kernel-name kernel_substring=kernel python tests/gpu/sanitize.py
"""

import jax
import jax.numpy as jnp
from gemm_forms import FORMS, assert_exact, every_config

from deepgemm_jax import (
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    grouped_mlp,
    indexer_topk,
    layout_transpose,
    m_grouped_bf16_gemm_nn_contiguous,
    quantize,
)
from deepgemm_jax._core.device import cuda_device
from deepgemm_jax.attention.config import logits_variants

for form in FORMS:
    for _, d in every_config(form, form.params.preferred_element_type):
        assert_exact(form, d)

for logits_config in logits_variants(cuda_device()):
    fits = logits_config.columns // logits_config.heads
    heads = logits_config.heads - (1 if fits == 1 else 4)
    s, t = fits if logits_config.query_groups == 1 else 3 * fits, 333
    q, kv = (jnp.ones(shape, jnp.float8_e4m3fn) for shape in ((s, heads, 128), (t, 128)))
    ends = jnp.arange(s, dtype=jnp.int32) * 11
    logits = fp8_mqa_logits(q, (kv, jnp.ones(t)), jnp.ones((s, heads)), 0 * ends, ends)
    assert (jax.block_until_ready(logits.max(1))[1:] == 128 * heads).all(), logits_config

# Pages of 64 keys, all ones; their scales are ones too.
page = jnp.concatenate(
    [
        jnp.ones(64 * 128, jnp.float8_e4m3fn).view(jnp.uint8),
        jnp.ones(64, jnp.float32).view(jnp.uint8),
    ]
)
cache = jnp.tile(page, (3, 1)).reshape(3, 64, 1, 132)
for next_n in range(1, 5):
    q, weights = jnp.ones((2, next_n, 64, 128), jnp.float8_e4m3fn), jnp.ones((2 * next_n, 64))
    lengths, table = jnp.array([66, 5]), jnp.array([[2, 0], [1, -1]])
    logits = fp8_paged_mqa_logits(q, cache, weights, lengths, table, None, 128)
    assert (jax.block_until_ready(logits.max(1)) == 128 * 64).all(), next_n

for logits_dtype in (jnp.float32, jnp.bfloat16):
    indices = indexer_topk(jnp.zeros((3, 7001), logits_dtype), 999)
    assert (jax.block_until_ready(indices) == jnp.arange(999)).all()

x, sizes = jnp.ones((304, 392), jnp.bfloat16), jnp.array([100, 130, 7])
gates, dy = jnp.ones((301, 512), jnp.bfloat16), jnp.ones((301, 256), jnp.bfloat16)
for result in (
    quantize.per_token_cast_to_fp8(x),
    quantize.per_channel_cast_to_fp8(x),
    quantize.per_block_cast_to_fp8(x),
    quantize.per_row_cast_to_fp8(x),
    *quantize.quantize_transpose(x),
    quantize.quantize_transpose(x, sizes)[0][:237],
):
    assert (result.dequantize() == 1).all()
jax.block_until_ready(
    [
        quantize.per_tensor_cast_to_fp8(x),
        quantize.swiglu_quantize(gates),
        quantize.swiglu_quantize_backward(gates, dy),
        quantize.activation_quantize(gates),
        quantize.activation_quantize_backward(gates, gates),
    ]
)

# Among others the kernels of its activation, and that which finds groups of rows told by id.
x, gate_up, down = (
    jnp.ones(shape, jnp.bfloat16) for shape in ((304, 64), (3, 64, 512), (3, 256, 64))
)
gradients = jax.grad(lambda x, *w: grouped_mlp(x, *w, sizes).astype(jnp.float32).sum(), (0, 1, 2))
jax.block_until_ready(gradients(x, gate_up, down))
ids = jnp.repeat(jnp.arange(3), jnp.array([100, 130, 74]), total_repeat_length=304)
jax.block_until_ready(m_grouped_bf16_gemm_nn_contiguous(x, gate_up, m_indices=ids))

for dtype in (jnp.int8, jnp.bfloat16, jnp.float32):
    elements = (jnp.arange(304 * 400) % 100).astype(dtype)
    assert (layout_transpose(elements.reshape(304, 400)).T.ravel() == elements).all()
