"""What only a GPU shows of the grouped GEMMs. Their values are tested in tests/grouped, on a GPU
too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import put, random_matrix

from deepgemm_jax import ScaledArray, explain, fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous
from deepgemm_jax.gemm.config import Config

pytestmark = pytest.mark.gpu

SIZES = np.array([300, 0, 1, 129, 64], np.int32)
M, N, K, G = 512, 264, 400, len(SIZES)


def random_operands(seed):
    rng = np.random.default_rng(seed)
    return put((random_matrix(rng, M, K, 1), random_matrix(rng, N, K, 128, (G,))), "cuda")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_each_group_is_bit_for_bit_the_dense_product(dtype):
    a, b = random_operands(0)
    d = m_grouped_fp8_gemm_nt_contiguous(a, b, group_sizes=SIZES, preferred_element_type=dtype)
    end = 0
    for g, size in enumerate(SIZES):
        start, end = end, end + size
        if not size:
            continue
        operands = a[start:end], b[g]
        [found] = explain(fp8_gemm_nt, *operands)
        config = next(c for c, _ in found.candidates if isinstance(c, Config))
        config = dataclasses.replace(config, out_float32=int(dtype == jnp.float32))
        one = fp8_gemm_nt(*operands, preferred_element_type=dtype, config=config)
        np.testing.assert_array_equal(d[start:end], one)
    assert not d[end:].any()


def test_new_sizes_compile_nothing():
    operands = random_operands(1)
    gemm = jax.jit(lambda a, b, sizes: m_grouped_fp8_gemm_nt_contiguous(a, b, group_sizes=sizes))
    for seed in range(4):
        sizes = np.random.default_rng(seed).integers(0, M // G, G).astype(np.int32)
        jax.block_until_ready(gemm(*operands, sizes))
    assert gemm._cache_size() == 1


def test_more_than_32_bits_of_elements():
    groups, n, k = 520, 2048, 2112  # 2.2e9 elements of B
    ids = np.repeat([0, 3, groups - 1], [5, 130, 7]).astype(np.int32)

    @jax.jit
    def matrices():  # each all of one number
        values = (jnp.arange(groups) % 7 - 3.0).astype(jnp.float8_e4m3fn)
        return jnp.broadcast_to(values[:, None, None], (groups, n, k))

    blocks = -(-k // 128)
    a = ScaledArray(jnp.ones((len(ids), k), jnp.float8_e4m3fn), jnp.ones((len(ids), blocks)))
    b = ScaledArray(matrices(), jnp.ones((groups, n // 128, blocks)))
    d = m_grouped_fp8_gemm_nt_contiguous(
        a, b, m_indices=ids, preferred_element_type=jnp.float32, implementation="cuda"
    )
    wanted = (ids % 7 - 3.0)[:, None] * k
    np.testing.assert_array_equal(np.asarray(d), np.broadcast_to(wanted, d.shape))
