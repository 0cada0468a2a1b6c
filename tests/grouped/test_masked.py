"""m_grouped_{fp8,bf16}_gemm_nt_masked against the oracles."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped.cases import any_lengths, every_recipe, forms, masked, pick, plain, scaled
from oracles import FLOAT8, assert_close, on_each_platform, put

from deepgemm_jax import m_grouped_fp8_gemm_nt_masked

G, M, N, K = 4, 37, 136, 144


@functools.cache
def jitted(form, dtype=jnp.bfloat16, zero_fill=True):
    return jax.jit(
        functools.partial(form.function, preferred_element_type=dtype, zero_fill=zero_fill)
    )


def check(form, a, b, counts, d, zeros=True, platform="cpu"):
    for g in range(G):
        rows = min(max(int(counts[g]), 0), M)
        valid = pick(a, np.s_[g, :rows])
        assert_close(d[g, :rows], form.dense(valid, pick(b, g)), platform)
        assert not (zeros and np.asarray(d[g, rows:], np.float32).any())


@on_each_platform
@masked
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "counts", [[0, 1, 36, 37], [0, 0, 0, 0], [-3, 38, 2**31 - 1, -(2**31)]], ids=str
)
def test_counts(platform, form, counts, dtype):
    a, b = form.masked_problem(0, M, N, K, G)
    operands = put((a, b, np.array(counts, np.int32)), platform)
    check(form, a, b, counts, jitted(form, dtype)(*operands), platform=platform)


@on_each_platform
@every_recipe
@pytest.mark.parametrize("dtypes", [(FLOAT8, FLOAT8), (FLOAT8, jnp.float8_e5m2)], ids=str)
def test_recipes(platform, recipe, of_a, of_b, dtypes):
    rng = np.random.default_rng(0)
    a, b = scaled(rng, dtypes[0], of_a, G, M, K), scaled(rng, dtypes[1], of_b, G, N, K)
    counts = np.array([5, 0, 20, 37], np.int32)
    d = jax.jit(functools.partial(m_grouped_fp8_gemm_nt_masked, recipe=recipe))(
        *put((a, b, counts), platform)
    )
    a64, b64 = (np.asarray(x.dequantize(), np.float64) for x in (a, b))
    for g, rows in enumerate(counts):
        assert_close(d[g, :rows], plain(a64[g, :rows], b64[g]), platform)


@on_each_platform
@any_lengths
@forms("m_grouped_bf16_gemm_nt_masked")
def test_any_lengths(platform, form, lengths):
    a, b = form.masked_problem(5, M, *lengths, G)
    counts = np.array([5, 0, 20, 37], np.int32)
    check(form, a, b, counts, jitted(form)(*put((a, b, counts), platform)), platform=platform)


@on_each_platform
@masked
def test_other_rows_may_hold_anything(platform, form):
    a, b = form.masked_problem(1, M, N, K, G)
    counts = np.array([5, 0, 20, 37], np.int32)
    for g, leaf in ((g, leaf) for g in range(G) for leaf in jax.tree.leaves(a)):
        leaf[g, counts[g] :] = np.nan
    operands = put((a, b, counts), platform)
    check(form, a, b, counts, jitted(form)(*operands), platform=platform)
    check(form, a, b, counts, jitted(form, zero_fill=False)(*operands), False, platform)


@masked
def test_mask_counts_its_rows(form):
    a, b = form.masked_problem(2, M, N, K, G)
    counts = np.array([5, 0, 20, 37], np.int32)
    mask = np.arange(M) < counts[:, None]
    d = jitted(form)(a, b, mask)
    np.testing.assert_array_equal(d, jitted(form)(a, b, counts))
    for expected in (1, 1000):
        np.testing.assert_array_equal(d, form.function(a, b, mask, expected, zero_fill=True))


@masked
@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, 0), (0, None, None)])
def test_vmap(form, axes):
    a, b = form.masked_problem(3, M, N, K, G, (2,))
    counts = np.array([[5, 0, 20, 37], [1, 2, 3, 4]], np.int32)
    operands = [
        x if axis == 0 else pick(x, 0) for x, axis in zip((a, b, counts), axes, strict=True)
    ]
    d = jax.jit(jax.vmap(functools.partial(form.function, zero_fill=True), axes))(*operands)
    for i in range(2):
        one = [pick(x, i) if axis == 0 else x for x, axis in zip(operands, axes, strict=True)]
        check(form, *one, d[i])


@masked
@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"masked_m": np.zeros(3, np.int32)}, ValueError, ["masked_m", "(3,)", "(4,)"]),
        ({"masked_m": np.zeros(4)}, TypeError, ["masked_m", "integers"]),
        ({"masked_m": np.zeros((4, 36), bool)}, ValueError, ["masked_m", "(4, 36)", "(4, 37)"]),
        ({"expected_m": -1}, ValueError, ["expected_m is -1"]),
        ({"preferred_element_type": jnp.float16}, ValueError, ["float16"]),
    ],
)
def test_bad_input(form, changed, error, named):
    a, b = form.masked_problem(4, M, N, K, G)
    with pytest.raises(error, match=f"^{form}: ") as raised:
        form.function(a, b, **{"masked_m": np.zeros(4, np.int32)} | changed)
    for words in named:
        assert words in str(raised.value)


@masked
def test_no_preferred_element_type_is_the_default(form):
    a, b = form.masked_problem(5, 8, 16, 128, 2)
    d = form.function(a, b, np.array([2, 3], np.int32), preferred_element_type=None)
    assert d.dtype == jnp.bfloat16


@masked
def test_operands_that_do_not_fit(form):
    a, b = form.masked_problem(4, M, N, K, G)
    with pytest.raises(ValueError, match=rf"^{form}: a has shape \(37, .* 3 dimensions"):
        form.function(pick(a, 0), b, np.zeros(4, np.int32))
    with pytest.raises(ValueError, match=rf"^{form}: b.* has shape \(3, "):
        form.function(a, pick(b, np.s_[:3]), np.zeros(4, np.int32))
    with pytest.raises(NotImplementedError, match=f"{form} has no kernel"):
        form.function(a, b, np.zeros(4, np.int32), implementation="cuda")


@masked
def test_example_of_the_docstring(form):
    (case,) = doctest.DocTestFinder(recurse=False).find(form.function, form.name)
    assert doctest.DocTestRunner().run(case).failed == 0
