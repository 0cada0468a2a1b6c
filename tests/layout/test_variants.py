"""Every variant of the transposing kernel, compiled; no GPU is needed for that."""

import pytest
from machine_code import assert_compiles_without_spills

from deepgemm_jax.layout import config


@pytest.mark.parametrize("variant", config.variants(), ids=str)
def test_nothing_is_spilled(variant):
    assert_compiles_without_spills(config.SOURCE, variant)
