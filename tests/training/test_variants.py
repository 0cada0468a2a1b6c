"""The kernels compiled for a GPU, which needs none."""

import pytest

from deepgemm_jax import _C
from deepgemm_jax.training import op


@pytest.mark.parametrize("source", op.variants())
def test_nothing_is_spilled(source):
    log = _C.compile(source, [], "sm_90a").log
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
