"""Every tile shape of the kernels once, for NVIDIA's compute-sanitizer to watch:

    XLA_PYTHON_CLIENT_PREALLOCATE=false compute-sanitizer --tool racecheck \\
        --kernel-name kernel_substring=kernel python tests/gpu/sanitize.py
"""

import jax
import jax.numpy as jnp

from deepgemm_jax import ScaledArray, fp8_gemm_nt
from deepgemm_jax._core.device import cuda_device
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
