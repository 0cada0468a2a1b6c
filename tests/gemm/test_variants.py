"""Every variant of the kernels, compiled; and one of each form, as machine code."""

import re

import pytest
from machine_code import assert_compiles_without_spills, compile_all, disassemble

from deepgemm_jax.gemm import config

VARIANTS = config.variants()
# What the tensor cores multiply is the same whatever the tile, which these do not tell.
FORM = ("source", "a_type", "b_type", "a_mn_major", "b_mn_major", "scales", "groups", "out_float32")
FORMS = {tuple(getattr(variant, part, 0) for part in FORM): variant for variant in VARIANTS}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    for source, configs in config.by_source(VARIANTS).items():
        compile_all(source, configs)


@pytest.mark.parametrize("variant", [*VARIANTS, config.Runs()], ids=str)
def test_nothing_is_spilled(variant):
    assert_compiles_without_spills(variant.source, variant)


@pytest.mark.parametrize("variant", FORMS.values(), ids=str)
def test_code_multiplies_on_tensor_cores(variant):
    code = disassemble(variant.source, variant)
    fp8 = config.ELEMENTS[variant.a_type].itemsize == 1
    assert re.search(r"\bQGMMA\b" if fp8 else r"\bHGMMA\b", code)
