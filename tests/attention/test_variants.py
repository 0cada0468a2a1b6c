"""Every variant of the kernels, as machine code."""

import re

import pytest
from machine_code import assert_nothing_spilled, compile_all, disassemble

from deepgemm_jax.attention import config

LOGITS = config.logits_variants()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    compile_all(config.LOGITS_SOURCE, LOGITS)


@pytest.mark.parametrize("variant", LOGITS, ids=str)
def test_logits_are_products_in_fp8_and_spill_nothing(variant):
    code = disassemble(config.LOGITS_SOURCE, variant)
    assert re.search(r"\bQGMMA\b", code)
    assert re.search(r"\bUTMALDG\b", code)
    assert_nothing_spilled(code)


@pytest.mark.parametrize("variant", config.TOPK_VARIANTS, ids=str)
def test_topk_loads_16_bytes_at_a_time_and_spills_nothing(variant):
    code = disassemble(config.TOPK_SOURCE, variant)
    assert re.search(r"\bLDG\.E\.128\b", code)
    assert_nothing_spilled(code)


def test_there_is_a_variant_for_every_call():
    for heads in range(1, config.MAX_HEADS + 1):
        for queries in (*range(1, 20), 1000):
            chosen = config.choose_logits(queries, heads, config.H200)
            assert chosen in LOGITS
            assert chosen.heads >= heads
            if chosen.query_groups == 1:  # and all queries are one block
                assert queries * chosen.heads <= chosen.columns
