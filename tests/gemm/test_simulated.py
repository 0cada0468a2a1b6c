"""The kernels themselves on the host, where there is no GPU: exact on integers, in each form."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from gemm_forms import FORMS, assert_exact
from gemm_simulator import simulate
from simulator_build import build

from deepgemm_jax._core.device import H200
from deepgemm_jax.gemm.config import Problem, candidates

BY_NAME = {form.name: form for form in FORMS}


@pytest.mark.parametrize(
    ("name", "dtype", "tile", "add"),
    [
        ("blocks float8_e4m3fn", jnp.bfloat16, (256, 128), False),
        ("blocks float8_e4m3fn", jnp.bfloat16, (256, 128), True),
        ("blocks float8_e4m3fn", jnp.float32, (192, 128), True),
        ("blocks float8_e5m2", jnp.bfloat16, (128, 160), True),
        ("17 rows", jnp.bfloat16, (64, 64), True),
        ("17 rows", jnp.float32, (64, 128), True),
        ("channels float8_e4m3fn", jnp.float32, (128, 128), True),
        ("channels float8_e4m3fn", jnp.bfloat16, (64, 128), False),
        ("rows float8_e4m3fn", jnp.bfloat16, (192, 128), False),
        ("long K", jnp.bfloat16, (192, 128), False),
        ("long K", jnp.float32, (128, 128), True),
        ("bf16 nt", jnp.float32, (128, 256), False),
        ("bf16 tn", jnp.bfloat16, (128, 256), False),
        ("bf16 nt", jnp.bfloat16, (128, 128), True),
        ("bf16 tn", jnp.float32, (128, 128), False),
        ("contiguous sorted", jnp.bfloat16, (192, 128), False),
        ("contiguous shuffled", jnp.float32, (64, 64), False),
        ("contiguous padded", jnp.bfloat16, (256, 128), False),
        ("contiguous padded", jnp.float32, (64, 64), False),
        ("contiguous in order channels", jnp.bfloat16, (128, 128), False),
        ("contiguous padded rows", jnp.float32, (192, 128), False),
        ("contiguous bf16 nt padded", jnp.bfloat16, (128, 256), False),
        ("contiguous bf16 nn sorted", jnp.bfloat16, (128, 128), False),
        ("masked", jnp.bfloat16, (128, 192), False),
        ("masked channels", jnp.float32, (64, 128), False),
        ("masked rows", jnp.bfloat16, (128, 192), False),
        ("along K", jnp.float32, (128, 128), False),
        ("along K", jnp.float32, (128, 64), True),
        ("along K bf16 tn", jnp.bfloat16, (128, 256), False),
    ],
    ids=str,
)
def test_simulated_kernel(name, dtype, tile, add, tmp_path):
    check(BY_NAME[name], dtype, {"block_m": tile[0], "block_n": tile[1]}, add, tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "tile", "add"),
    [
        ("1 rows", jnp.bfloat16, (8, 1, 2), False),
        ("17 rows", jnp.bfloat16, (32, 1, 3), True),
        ("17 rows", jnp.float32, (8, 1, 8), True),
        ("128 rows", jnp.bfloat16, (64, 1, 3), False),
        ("128 rows", jnp.bfloat16, (128, 2, 2), False),
        ("128 rows", jnp.float32, (128, 3, 1), False),
        ("17 rows bf16", jnp.bfloat16, (32, 1, 2), False),
        ("128 rows bf16", jnp.float32, (64, 2, 1), True),
    ],
    ids=str,
)
def test_simulated_kernel_for_few_rows(name, dtype, tile, add, tmp_path):
    shape = dict(zip(("block_m", "consumers", "split"), tile, strict=True))
    check(BY_NAME[name], dtype, shape, add, tmp_path)


@pytest.mark.parametrize(
    "tile", [(256, 128, 2), (192, 128, 2), (128, 192, 1), (64, 64, 1)], ids=str
)
def test_each_element_is_one_tiles(tile, tmp_path):
    """Where the last round is divided, too, and where some multiprocessors stay idle."""
    problem = Problem(m=999, n=999, k=999, batch=1, out_dtype=jnp.bfloat16, accumulate=False)
    shape = dict(zip(("block_m", "block_n", "cluster_n"), tile, strict=True))
    config = config_of_shape(problem, shape)
    walk = build("tiles.cc", config.integers, tmp_path).run
    rng = np.random.default_rng(0)
    for _ in range(50):
        batch, m, n, sms = (int(rng.integers(1, most)) for most in (3, 900, 900, 40))
        times = np.zeros((batch, m, n), np.intc)
        walk(*times.shape, 128, max(sms, tile[2]), times.ctypes)
        assert (times == 1).all(), (batch, m, n, sms)


def check(form, dtype, shape, add, tmp_path):
    c = None
    if add:
        c = np.random.default_rng(1).integers(-9, 9, form.expected.shape).astype(dtype)
    config = config_of_shape(form.problem(dtype, c), shape)
    assert_exact(form, simulate(form, config, tmp_path, c), c)


def config_of_shape(problem, shape):
    """The likeliest with these integers."""
    return next(
        config
        for config, _ in candidates(problem, H200)
        if shape.items() <= dataclasses.asdict(config).items()
    )
