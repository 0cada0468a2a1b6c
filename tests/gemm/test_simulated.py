"""The kernel itself on the host, where there is no GPU: exact on integers, in each of its forms."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from gemm_forms import FORMS, assert_exact
from gemm_simulator import simulate

from deepgemm_jax._core.device import H200
from deepgemm_jax.gemm.config import candidates

BY_NAME = {form.name: form for form in FORMS}


@pytest.mark.parametrize(
    ("name", "dtype", "tile", "add"),
    [
        ("blocks float8_e4m3fn", jnp.bfloat16, (256, 128), False),
        ("blocks float8_e5m2", jnp.bfloat16, (128, 160), True),
        ("channels float8_e4m3fn", jnp.float32, (192, 128), True),
        ("rows float8_e4m3fn", jnp.bfloat16, (192, 128), False),
        ("bf16 nt", jnp.float32, (128, 256), False),
        ("bf16 tn", jnp.bfloat16, (128, 256), False),
        ("contiguous sorted", jnp.bfloat16, (192, 128), False),
        ("contiguous shuffled", jnp.float32, (64, 64), False),
        ("contiguous bf16 nn sorted", jnp.bfloat16, (128, 128), False),
        ("masked", jnp.bfloat16, (128, 128), False),
        ("along K", jnp.float32, (192, 128), True),
        ("along K bf16 tn", jnp.bfloat16, (128, 256), False),
    ],
    ids=str,
)
def test_simulated_kernel(name, dtype, tile, add, tmp_path):
    form = BY_NAME[name]
    params = dataclasses.replace(form.params, preferred_element_type=jnp.dtype(dtype))
    config, *_ = (
        config
        for config, _ in candidates(form.form.problem(params, form.operands), H200)
        if (config.block_m, config.block_n) == tile
    )
    c = None
    if add:
        c = np.random.default_rng(1).integers(-9, 9, form.expected.shape).astype(dtype)
    assert_exact(form, simulate(form, config, tmp_path, c), c)
