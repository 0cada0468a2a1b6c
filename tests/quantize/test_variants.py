"""Every variant of the quantising kernels, compiled; no GPU is needed for that."""

import dataclasses

import pytest

from deepgemm_jax import _C, runtime
from deepgemm_jax.quantize import config

ARCH = "sm_90a"
VARIANTS = [(source, x) for source, configs in config.variants().items() for x in configs]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """All at once in processes of their own; the tests then read them from the cache."""
    runtime.compile_variants(
        runtime.Variant(source, dataclasses.astuple(variant), ARCH) for source, variant in VARIANTS
    )


@pytest.mark.parametrize(("source", "variant"), VARIANTS, ids=str)
def test_nothing_is_spilled(source, variant):
    log = _C.compile(source, dataclasses.astuple(variant), ARCH).log
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
