"""fp8_gemm_nt against the oracles: on the CPU its reference, on a GPU its kernel."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import (
    BLOCK,
    FLOAT8,
    assert_close,
    difference,
    on_each_platform,
    product,
    put,
    quantize,
    random_like,
    random_problem,
)

from deepgemm_jax import (
    ScaledArray,
    bf16_gemm_nn,
    fp8_gemm_1d1d,
    fp8_gemm_1d2d,
    fp8_gemm_nn,
    fp8_gemm_nt,
    fp8_gemm_tn,
    fp8_gemm_tt,
)

DTYPES = [jnp.bfloat16, jnp.float32]


def check(platform, seed, m, n, k, dtype, add):
    a, b = random_problem(seed, m, n, k)
    c = random_like(seed, m, n, k, dtype) if add else None
    gemm = jax.jit(functools.partial(fp8_gemm_nt, preferred_element_type=dtype))
    d = gemm(*put((a, b, c), platform))
    assert d.dtype == dtype
    assert_close(d, product(a, b, c), platform)


@on_each_platform
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("m", [0, 1, 3, 63, 64, 65, 127, 128, 129, 1000])
def test_rows(platform, m, add):
    check(platform, 0, m, 200, 400, jnp.bfloat16, add)


@on_each_platform
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(0, 300),
    n=st.integers(16, 400),
    k=st.integers(1, 60).map(lambda k: 16 * k),
    dtype=st.sampled_from(DTYPES),
    add=st.booleans(),
)
@example(seed=0, m=1, n=16, k=16, dtype=jnp.float32, add=True)
@example(seed=0, m=130, n=257, k=144, dtype=jnp.bfloat16, add=False)
def test_shapes(platform, seed, m, n, k, dtype, add):
    check(platform, seed, m, n, k, dtype, add)


@on_each_platform
def test_product_of_what_was_quantised(platform):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(256, 1024)), rng.normal(size=(384, 1024))
    d = fp8_gemm_nt(*put((quantize(x, 1), quantize(w, BLOCK)), platform))
    assert difference(d, x @ w.T) < 1e-3


@on_each_platform
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_rows(platform, dtype):
    a, b = random_problem(1, 130, 200, 400)
    a.data[3, 5] = np.nan
    a.data[129, 399] = np.nan
    a.scale[64, 1] = np.inf
    a.scale[65, 3] = np.nan
    a.data[66, :BLOCK], a.scale[66, 0] = 0, np.inf
    d = fp8_gemm_nt(*put((a, b), platform), preferred_element_type=dtype)
    assert_close(d, product(a, b), platform)
    assert np.isfinite(np.delete(np.asarray(d, np.float32), [3, 64, 65, 66, 129], 0)).all()


@on_each_platform
def test_nan_and_infinity_of_b_stay_in_their_columns(platform):
    a, b = random_problem(2, 70, 300, 400)
    b.data[7, 5] = np.nan
    b.scale[2, 3] = np.inf
    d = fp8_gemm_nt(*put((a, b), platform))
    assert_close(d, product(a, b), platform)
    assert np.isfinite(np.delete(np.asarray(d, np.float32)[:, :256], 7, 1)).all()


@on_each_platform
def test_results_repeat_bit_for_bit(platform):
    a, b = put(random_problem(3, 257, 384, 1024), platform)
    gemm = jax.jit(fp8_gemm_nt)
    first = np.asarray(gemm(a, b)).tobytes()
    assert all(np.asarray(gemm(a, b)).tobytes() == first for _ in range(10))
    assert np.asarray(fp8_gemm_nt(a, b)).tobytes() == first


@on_each_platform
def test_c_is_only_taken_if_donated(platform):
    a, b = random_problem(4, 100, 256, 256)
    c = random_like(4, 100, 256, 256, jnp.float32)
    oracle, twice = product(a, b, c), product(a, b, 2 * c)
    a, b, on_device = put((a, b, c), platform)
    gemm = functools.partial(fp8_gemm_nt, preferred_element_type=jnp.float32)
    d, untouched = jax.jit(lambda a, b, c: (gemm(a, b, c), c))(a, b, on_device)
    np.testing.assert_array_equal(untouched, c)
    assert_close(d, oracle, platform)
    assert_close(jax.jit(lambda a, b, c: gemm(a, b, c) + c)(a, b, on_device), twice, platform)
    assert_close(jax.jit(gemm, donate_argnums=2)(a, b, on_device), oracle, platform)


@on_each_platform
@pytest.mark.parametrize("n", [200, 256])
@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, None), (0, None, 0)])
def test_vmap(platform, axes, n):
    batch = 3
    a, b = random_problem(5, 65, n, 272, (batch,))
    c = random_like(5, 65, n, 272, jnp.bfloat16, (batch,))
    a, b, c = (
        x if axis == 0 else jax.tree.map(lambda leaf: leaf[0], x)
        for x, axis in zip((a, b, c), axes, strict=True)
    )
    d = jax.jit(jax.vmap(fp8_gemm_nt, in_axes=axes))(*put((a, b, c), platform))
    for i in range(batch):
        one = (
            x if axis is None else jax.tree.map(lambda leaf, i=i: leaf[i], x)
            for x, axis in zip((a, b, c), axes, strict=True)
        )
        assert_close(d[i], product(*one), platform)


@on_each_platform
def test_nested_vmap(platform):
    a, b = random_problem(6, 33, 130, 144, (2, 3))
    d = jax.vmap(jax.vmap(fp8_gemm_nt))(*put((a, b), platform))
    assert_close(d, product(a, b), platform)
    shared = jax.tree.map(lambda leaf: leaf[:, 0], b)
    d = jax.vmap(jax.vmap(fp8_gemm_nt, (0, None)))(*put((a, shared), platform))
    each = ScaledArray(*(np.stack([leaf] * 3, 1) for leaf in (shared.data, shared.scale)))
    assert_close(d, product(a, each), platform)


@on_each_platform
def test_vmap_over_another_dim(platform):
    a, b = random_problem(7, 40, 128, 128, (5,))
    d = jax.vmap(fp8_gemm_nt, in_axes=(0, 0), out_axes=2)(*put((a, b), platform))
    assert_close(jnp.moveaxis(d, 2, 0), product(a, b), platform)
    moved = ScaledArray(np.moveaxis(a.data, 0, 1), np.moveaxis(a.scale, 0, 2))
    d = jax.vmap(fp8_gemm_nt, in_axes=(ScaledArray(1, 2), 0))(*put((moved, b), platform))
    assert_close(d, product(a, b), platform)


@on_each_platform
def test_scan_and_remat(platform):
    a, b = random_problem(8, 64, 128, 256)
    on_device = put((a, b), platform)

    @jax.jit
    def total(a, b):
        gemm = jax.checkpoint(functools.partial(fp8_gemm_nt, preferred_element_type=jnp.float32))
        return jax.lax.scan(lambda d, _: (gemm(a, b, d), None), jnp.zeros((64, 128)), length=3)[0]

    oracle = product(a, b)
    for _ in range(2):
        oracle = product(a, b, oracle.value)
    assert_close(total(*on_device), oracle, platform)


def test_tuples_stand_for_scaled_arrays():
    a, b = random_problem(10, 5, 16, 32)
    d = fp8_gemm_nt((a.data, a.scale), (b.data, b.scale), recipe=(1, 128, 128))
    np.testing.assert_array_equal(d, fp8_gemm_nt(a, b))


def array(dtype, *shape):
    return jnp.zeros(shape, dtype)


A = array(FLOAT8, 5, 256), array(jnp.float32, 5, 2)
B = array(FLOAT8, 300, 256), array(jnp.float32, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "named"),
    [
        ((array(jnp.float32, 5, 256), B), {}, TypeError, ["a is float32[5,256]", "ScaledArray"]),
        (
            ((array(jnp.float32, 5, 256), A[1]), B),
            {},
            TypeError,
            ["a.data has dtype float32", "float8_e4m3fn"],
        ),
        ((A, (B[0], B[1].astype(jnp.bfloat16))), {}, TypeError, ["b.scale", "bfloat16", "float32"]),
        (((A[0][0], A[1]), B), {}, ValueError, ["a.data", "(256,)", "2 dimensions [m k]"]),
        (((A[0][None], A[1][None]), B), {}, ValueError, ["a.data", "(1, 5, 256)", "[m k]"]),
        ((A, (array(FLOAT8, 300, 240), B[1])), {}, ValueError, ["b.data", "240", "(300, 256)"]),
        (((A[0], array(jnp.float32, 5, 3)), B), {}, ValueError, ["a.scale", "(5, 3)", "(5, 2)"]),
        (((A[0], array(jnp.float32, 4, 2)), B), {}, ValueError, ["a.scale", "(4, 2)", "(5, 2)"]),
        ((A, (B[0], array(jnp.float32, 2, 2))), {}, ValueError, ["b.scale", "(2, 2)", "(3, 2)"]),
        (
            ((array(FLOAT8, 5, 40), A[1][:, :1]), (array(FLOAT8, 300, 40), B[1][:, :1])),
            {},
            ValueError,
            ["a.data has k = 40", "multiple of 16"],
        ),
        ((A, (array(FLOAT8, 15, 256), B[1][:1])), {}, ValueError, ["b.data has n = 15", "16"]),
        ((A, B, array(jnp.bfloat16, 5, 301)), {}, ValueError, ["c has", "(5, 301)", "(5, 300)"]),
        ((A, B, array(jnp.float32, 5, 300)), {}, TypeError, ["c has", "float32", "bfloat16"]),
        (
            (A, B),
            {"preferred_element_type": jnp.float16},
            ValueError,
            ["preferred_element_type", "float16", "bfloat16 or float32"],
        ),
        (
            (A, B),
            {"recipe": (1, 1, 128)},
            ValueError,
            ["(5, 2) and (3, 2), wanted (5, 2) and (300, 2) for recipe (1, 1, 128)"],
        ),
        (
            (A, B),
            {"recipe": (1, 1, 0)},
            ValueError,
            ["(5, 2) and (3, 2), wanted (5, 1) or (1, 1) and (300, 1) or (1, 1) for recipe"],
        ),
        ((A, B), {"recipe": (1, 1, 7)}, ValueError, ["recipe is (1, 1, 7)", "(1, 128, 128) or"]),
        (
            ((A[0], A[1][:, :1]), B),
            {},
            ValueError,
            ["(5, 1) and (3, 2), wanted (5, 2) and (3, 2) for", "(300, 2) for", "(300, 1) or"],
        ),
        (((A[0], A[1][:, 0]), B), {}, ValueError, ["a.scale", "(5,) and (3, 2)"]),
        ((A, (B[0], B[1][0, 0])), {}, ValueError, ["b.scale", "(5, 2) and ()"]),
        ((A, B), {"implementation": "gpu"}, ValueError, ["implementation", "'gpu'", "'cuda'"]),
        ((A, B), {"config": "fast"}, ValueError, ["config is 'fast'", "explain"]),
    ],
)
def test_bad_input(arguments, keywords, error, named):
    with pytest.raises(error, match="^fp8_gemm_nt: ") as raised:
        jax.eval_shape(functools.partial(fp8_gemm_nt, **keywords), *arguments)
    for words in named:
        assert words in str(raised.value)


def test_bad_k_of_an_operand_that_is_transposed():
    a = jnp.ones((64, 100), jnp.float8_e4m3fn), jnp.ones((64, 1))
    b = jnp.ones((100, 512), jnp.float8_e4m3fn), jnp.ones((1, 4))
    with pytest.raises(ValueError, match="a.data has k = 100, wanted .* a multiple of 16"):
        fp8_gemm_nn(a, b)


def test_bad_input_of_an_operand_that_is_transposed():
    """Errors are of the op that was called, and of shapes as they were passed."""
    a, b = (A[0].T, A[1].T), (B[0].T, B[1].T)
    c = array(jnp.bfloat16, 5, 301)
    wide = array(FLOAT8, 240, 300), B[1].T
    for gemm, arguments, error in [
        (fp8_gemm_nn, (A, wide), r"b.data has shape \(240, 300\), wanted \(256, 300\).* \[k n\]"),
        (fp8_gemm_nn, (A, (b[0], B[1])), r"\(5, 2\) and \(3, 2\), wanted \(5, 2\) and \(2, 3\)"),
        (fp8_gemm_tn, (a, b, c), r"c has shape \(5, 301\), wanted \(5, 300\)"),
        (fp8_gemm_tn, (A, b), r"b.data has shape \(256, 300\), wanted \(5, 300\)"),
        (fp8_gemm_tt, (a, (B[0], None)), "b is "),
        (fp8_gemm_tt, ((a[0], a[1].astype(jnp.bfloat16)), B), "a.scale has dtype bfloat16"),
        (fp8_gemm_1d1d, (A, B), r"and \(3, 2\), wanted \(5, 2\) and \(300, 2\)"),
        (fp8_gemm_1d2d, (A, (B[0], array(jnp.float32, 300, 2))), r"wanted \(5, 2\) and \(3, 2\)"),
    ]:
        with pytest.raises((TypeError, ValueError), match=f"^{gemm.__name__}: .*{error}"):
            gemm(*arguments)


def test_no_preferred_element_type_is_the_default():
    x = array(jnp.bfloat16, 16, 16)
    rows = array(FLOAT8, 300, 256), array(jnp.float32, 300, 2)
    assert fp8_gemm_nt(A, B, preferred_element_type=None).dtype == jnp.bfloat16
    assert fp8_gemm_1d1d(A, rows, preferred_element_type=None).dtype == jnp.float32
    assert bf16_gemm_nn(x, x, preferred_element_type=None).dtype == jnp.bfloat16


def test_derivative_says_what_to_do_instead():
    a, b = random_problem(11, 5, 16, 32)

    def loss(scale):
        return fp8_gemm_nt((a.data, scale), b).sum().astype(jnp.float32)

    with pytest.raises(NotImplementedError, match="fp8_gemm_nt has no derivative.*custom_vjp"):
        jax.grad(loss)(jnp.asarray(a.scale))


def test_example_of_the_docstring():
    (case,) = doctest.DocTestFinder(recurse=False).find(fp8_gemm_nt)
    assert doctest.DocTestRunner().run(case).failed == 0
