"""The choice of a config, for problems and GPUs of all sizes."""

import dataclasses
import math
import random

import jax
import jax.numpy as jnp
import pytest

from deepgemm_jax import bf16_gemm_nt, explain
from deepgemm_jax._core.device import H200, cuda_device
from deepgemm_jax.gemm.config import (
    MAX_STAGES,
    Config,
    FewRows,
    Problem,
    candidates,
    choose,
    variants,
)

PROBLEM = Problem(m=130, n=200, k=400, batch=1, out_dtype=jnp.bfloat16, accumulate=False)
VARIANTS = set(variants())
FP8 = [{"scales": scales} for scales in ("blocks", "channels", "rows")]
BF16 = [
    {"scales": "none", "a_mn_major": a, "b_mn_major": b}
    | {"a_dtype": jnp.bfloat16, "b_dtype": jnp.bfloat16}
    for a in (False, True)
    for b in (False, True)
]
GROUPED = [
    {"scales": "blocks", "groups": "contiguous"},
    {"scales": "blocks", "groups": "masked"},
    {"scales": "channels", "groups": "along_k"},
    BF16[0] | {"groups": "contiguous"},
    BF16[1] | {"groups": "contiguous"},
    BF16[0] | {"groups": "masked"},
    BF16[3] | {"groups": "along_k"},
]


def random_problem(rng: random.Random) -> Problem:
    def up_to(bits: int) -> int:
        """Of all magnitudes alike."""
        return rng.randint(1, 2 ** rng.randint(0, bits))

    sizes = {
        "m": up_to(20) if rng.random() > 0.02 else 0,
        "n": up_to(18) + 15,
        "k": 16 * up_to(14),
        "batch": up_to(8),
        "out_dtype": rng.choice([jnp.bfloat16, jnp.float32]),
    }
    form = rng.choice(FP8 + BF16 + GROUPED)
    # There is no C where groups are of rows.
    adds = form.get("groups") not in ("contiguous", "masked") and rng.random() < 0.5
    return Problem(**sizes, **form, accumulate=adds)


def test_choice():
    rng = random.Random(0)
    for _ in range(10_000):
        problem = random_problem(rng)
        # Whole GPUs, and parts of them.
        device = dataclasses.replace(H200, num_sms=rng.randint(2, 144))
        found = candidates(problem, device)
        seconds = [predicted for _, predicted in found]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0 and math.isfinite(seconds[-1])
        assert len({config for config, _ in found}) == len(found)

        config = choose(problem, device)
        assert config == found[0][0]
        config.validate(problem, device)
        assert config.smem_bytes <= device.smem_bytes
        assert config.num_sms(device) <= device.num_sms
        if isinstance(config, Config):
            deeper = dataclasses.replace(config, stages=config.stages + 1)
            assert config.stages == MAX_STAGES or deeper.smem_bytes > device.smem_bytes
        assert config in VARIANTS, "warm-up would not compile it"


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
        ({"out_float32": 1}, "out_float32=0, as the operands have it"),
        ({"scales": 2}, "scales=1, as the operands have it"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(change, wanted):
    config = dataclasses.replace(choose(PROBLEM, H200), block_m=128, block_n=64, consumers=2)
    config = dataclasses.replace(config, stages=4, cluster_m=1, cluster_n=1)
    assert_refused(config, change, wanted)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"block_m": 24}, "block_m = 8, 16, 32, 64 or 128"),
        ({"consumers": 4}, "1 to 3 consumers"),
        ({"split": 0}, "K divided among 1 to 8 CTAs"),
        ({"split": 9}, "K divided among 1 to 8 CTAs"),
        ({"stages": 1}, "2 to 12 stages"),
        ({"stages": 10}, "at most 232448 bytes of shared memory, not "),
        ({"a_type": 1}, "a_type=0, as the operands have it"),
        ({"scales": 0}, "scales=1, as the operands have it"),
    ],
    ids=str,
)
def test_config_for_few_rows_that_does_not_fit(change, wanted):
    config = FewRows(
        64,
        consumers=2,
        stages=8,
        split=2,
        out_float32=0,
        accumulate=0,
        a_type=0,
        b_type=0,
        scales=1,
    )
    assert_refused(config, change, wanted)
    for form, wanted in (
        ({"groups": "masked"}, "a dense GEMM"),
        ({"scales": "rows"}, "no scales, or scales of blocks"),
        ({"b_mn_major": True}, "operands whose K is contiguous"),
    ):
        with pytest.raises(ValueError, match=wanted):
            config.validate(dataclasses.replace(PROBLEM, **form), H200)


def assert_refused(config, change, wanted):
    config.validate(PROBLEM, H200)
    config = dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match="^config is ") as raised:
        config.validate(PROBLEM, H200)
    assert str(config) in str(raised.value)
    assert wanted in str(raised.value)


@pytest.mark.parametrize(
    ("form", "change", "wanted"),
    [
        (FP8[1], {"block_n": 96}, "block_n a multiple of 64 with a scale for each column"),
        (FP8[1], {"block_n": 192}, "at most 232 registers a thread, not 312"),
        (BF16[1], {"block_n": 96}, "loads of whole 64 rows where K is not contiguous"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_form(form, change, wanted):
    problem = dataclasses.replace(PROBLEM, **form)
    config = dataclasses.replace(choose(problem, H200), block_m=128, block_n=64, consumers=2)
    config = dataclasses.replace(config, stages=3, cluster_m=1, cluster_n=1)
    config.validate(problem, H200)
    with pytest.raises(ValueError, match=wanted):
        dataclasses.replace(config, **change).validate(problem, H200)


def test_explanation():
    a, b = (jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16) for rows in (300, 512))
    for _ in range(2):  # It must not matter what JAX remembers.
        [found] = explain(lambda a, b: bf16_gemm_nt(a, b) + 1, a, b)
        problem = found.problem
        assert (problem.m, problem.n, problem.k, problem.scales) == (300, 512, 4096, "none")
        assert found.config == choose(problem, cuda_device())
        assert found.candidates == candidates(problem, cuda_device())
        lines = str(found).splitlines()
        assert len(lines) == 1 + len(found.candidates)
        assert lines[1].startswith("*") and "µs" in lines[1]
    assert explain(lambda x: x + 1, a) == []
