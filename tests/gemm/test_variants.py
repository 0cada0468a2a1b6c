"""Every variant of the kernel, as machine code."""

import re

import pytest
from machine_code import assert_nothing_spilled, compile_all, disassemble

from deepgemm_jax.gemm import config

VARIANTS = config.variants()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    for source, configs in config.by_source(VARIANTS).items():
        compile_all(source, configs)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_code_multiplies_on_tensor_cores_and_spills_nothing(variant):
    code = disassemble(variant.source, variant)
    fp8 = config.ELEMENTS[variant.a_type].itemsize == 1
    assert re.search(r"\bQGMMA\b" if fp8 else r"\bHGMMA\b", code)
    assert_nothing_spilled(code)
