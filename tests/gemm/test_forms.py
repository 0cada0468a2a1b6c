"""What the GEMM kernel computes in each of its forms: exactly, on integers."""

import jax.numpy as jnp
import numpy as np
import pytest
from gemm_forms import FORMS, assert_exact, every_config, run

on_each_form = pytest.mark.parametrize("form", FORMS, ids=str)


DTYPES = [jnp.bfloat16, jnp.float32]


def c_like(form, dtype) -> np.ndarray:
    return np.random.default_rng(1).integers(-9, 9, form.expected.shape).astype(dtype)


def takes_c(form) -> bool:
    return any(array.name == "c" for array in form.op.signature.operands)


@on_each_form
def test_result(form):
    assert_exact(form, run(form, form.params.preferred_element_type))


@on_each_form
@pytest.mark.gpu
def test_result_of_every_config(form):
    for dtype in DTYPES:
        for c in (None, c_like(form, dtype)) if takes_c(form) else (None,):
            for _, d in every_config(form, dtype, c):
                assert_exact(form, d, c)
