"""Every variant of the quantising kernels, compiled; no GPU is needed for that."""

import pytest
from machine_code import assert_compiles_without_spills, compile_all

from deepgemm_jax.quantize import config

VARIANTS = [(source, x) for source, configs in config.variants().items() for x in configs]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """In processes of their own; the tests then read them from the cache."""
    for source, configs in config.variants().items():
        compile_all(source, configs)


@pytest.mark.parametrize(("source", "variant"), VARIANTS, ids=str)
def test_nothing_is_spilled(source, variant):
    assert_compiles_without_spills(source, variant)
