"""Every variant of the transposing kernel, compiled; no GPU is needed for that."""

import dataclasses

import pytest

from deepgemm_jax import _C
from deepgemm_jax.layout import config


@pytest.mark.parametrize("variant", config.variants(), ids=str)
def test_nothing_is_spilled(variant):
    log = _C.compile(config.SOURCE, dataclasses.astuple(variant), "sm_90a").log
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
