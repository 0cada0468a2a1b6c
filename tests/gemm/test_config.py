"""The choice of a config, for problems and GPUs of all sizes."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgemm_jax import _C
from deepgemm_jax._core.device import H200
from deepgemm_jax.gemm.config import MAX_STAGES, TILES, Problem, candidates, choose, variants

PROBLEM = Problem(m=130, n=200, k=400, batch=1, out_dtype=jnp.bfloat16, accumulate=False)
VARIANTS = set(variants())


def smem_bytes(config) -> int:
    return _C.gemm_smem_bytes(dataclasses.astuple(config))


def up_to(bits: int):
    """Integers of all magnitudes alike."""
    return st.integers(0, bits).flatmap(lambda bit: st.integers(1, 2**bit))


problems = st.builds(
    Problem,
    m=st.just(0) | up_to(20),
    n=up_to(18).map(lambda n: n + 15),
    k=up_to(14).map(lambda k: 16 * k),
    batch=up_to(8),
    out_dtype=st.sampled_from([jnp.bfloat16, jnp.float32]),
    accumulate=st.booleans(),
)
# Whole GPUs, and parts of them.
devices = st.integers(2, 144).map(lambda sms: dataclasses.replace(H200, num_sms=sms))


@settings(deadline=None, max_examples=1000)
@given(problem=problems, device=devices)
def test_choice(problem, device):
    found = candidates(problem, device)
    seconds = [predicted for _, predicted in found]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0 and math.isfinite(seconds[-1])
    assert len({config for config, _ in found}) == len(TILES)

    config = choose(problem, device)
    assert config == found[0][0]
    config.validate(problem, device)
    assert smem_bytes(config) <= device.smem_bytes
    assert config in VARIANTS, "warm-up would not compile it"


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_makes_valid_configs(tile):
    shape = tile.block_m, tile.block_n
    for out_dtype, accumulate in itertools.product((jnp.bfloat16, jnp.float32), (False, True)):
        problem = dataclasses.replace(PROBLEM, out_dtype=out_dtype, accumulate=accumulate)
        (config,) = (
            config
            for config, _ in candidates(problem, H200)
            if (config.block_m, config.block_n) == shape
            and (config.cluster_m, config.cluster_n) == (tile.cluster_m, tile.cluster_n)
        )
        config.validate(problem, H200)
        deeper = dataclasses.replace(config, stages=config.stages + 1)
        assert config.stages == MAX_STAGES or smem_bytes(deeper) > H200.smem_bytes


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"consumers": 0}, "1 to 3 consumers"),
        ({"consumers": 4}, "1 to 3 consumers"),
        ({"block_m": 96}, "block_m = 64 or 128 for each consumer"),
        ({"block_m": 384}, "block_m = 64 or 128 for each consumer"),
        ({"block_n": 0}, "block_n a multiple of 16"),
        ({"block_n": 24}, "block_n a multiple of 16"),
        ({"block_n": 272}, "block_n a multiple of 16, at most 256"),
        ({"cluster_m": 2, "cluster_n": 2}, "a cluster of one CTA or two"),
        ({"cluster_n": 3}, "a cluster of one CTA or two"),
        ({"stages": 1}, "2 to 12 stages"),
        ({"stages": 100_000}, "2 to 12 stages"),
        ({"block_m": 256, "block_n": 192}, "at most 232 registers a thread, not 312"),
        ({"stages": 12}, "at most 232448 bytes of shared memory, not "),
        ({"out_float32": 1}, "out_float32=0 for a result of"),
        ({"accumulate": 1}, "accumulate=0, which says whether C is given"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(change, wanted):
    config = dataclasses.replace(choose(PROBLEM, H200), block_m=128, block_n=64, consumers=2)
    config = dataclasses.replace(config, stages=4, cluster_m=1, cluster_n=1)
    config.validate(PROBLEM, H200)
    config = dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match="^fp8_gemm_nt: config is ") as raised:
        config.validate(PROBLEM, H200)
    assert str(config) in str(raised.value)
    assert wanted in str(raised.value)
