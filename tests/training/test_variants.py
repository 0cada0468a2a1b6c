"""The kernels compiled for a GPU, which needs none."""

import pytest
from machine_code import assert_compiles_without_spills

from deepgemm_jax.training import op


@pytest.mark.parametrize("source", op.variants())
def test_nothing_is_spilled(source):
    assert_compiles_without_spills(source, *op.variants()[source])
