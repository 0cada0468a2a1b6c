"""The casts against NumPy and ml_dtypes, bit for bit."""

import doctest
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cast_oracles import FP8, TINY, assert_same, cast, divide, largest, random_input, scale_of
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgemm_jax import ScaledArray, fp8_gemm_nt, quantize
from deepgemm_jax.quantize import (
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_row_cast_to_fp8,
    per_tensor_cast_to_fp8,
    per_token_cast_to_fp8,
    prepare_weight,
)
from deepgemm_jax.scaled import unpack_ue8m0

# None is the whole length.
BLOCKS = {
    per_token_cast_to_fp8: (1, 128),
    per_channel_cast_to_fp8: (128, 1),
    per_block_cast_to_fp8: (128, 128),
    per_row_cast_to_fp8: (1, None),
    per_tensor_cast_to_fp8: (None, None),
}
FORMS = [(FP8[0], "float32"), (FP8[1], "ue8m0")]
each_cast = pytest.mark.parametrize("function", BLOCKS, ids=lambda function: function.__name__)


@functools.cache
def jitted(function, dtype, scale_format):
    return jax.jit(functools.partial(function, dtype=dtype, scale_format=scale_format))


def block_of(function, x):
    return [size or max(n, 1) for size, n in zip(BLOCKS[function], x.shape, strict=True)]


@each_cast
@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**32 - 1),
    # Few shapes, for each is compiled.
    shape=st.sampled_from([(1, 1), (130, 300)]),
    x_dtype=st.sampled_from([jnp.bfloat16, jnp.float32, jnp.float16]),
    form=st.sampled_from(FORMS),
)
def test_bits(function, seed, shape, x_dtype, form):
    dtype, scale_format = form
    with np.errstate(over="ignore"):
        x = random_input(seed, shape, x_dtype)
    result = jitted(function, dtype, scale_format)(x)
    block = block_of(function, x)
    assert_same(result, *cast(x, block, dtype, scale_format == "ue8m0"))
    if np.isfinite(x.astype(np.float32)).all():
        error = abs(np.asarray(result.dequantize(), np.float64) - x.astype(np.float64))
        scale = ScaledArray(np.ones(x.shape), result.scale).dequantize()
        eps = float(ml_dtypes.finfo(dtype).eps)
        tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
        excess = error - abs(x.astype(np.float64)) * eps / 2 * 1.0001
        assert (excess <= np.asarray(scale) * tiny / 2 * 1.0001 + TINY).all()


@each_cast
def test_no_rows(function):
    result = function(np.zeros((0, 130), np.float32))
    assert result.data.shape == (0, 130)
    rows = 1 if function is per_tensor_cast_to_fp8 else 0
    assert result.scale.shape[0] == rows
    assert result.dequantize().shape == (0, 130)


BFLOAT16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
SCALES = [
    1,
    2,
    0.5,
    1 / 448,
    1 / 3,
    3,
    0.1,
    7.3e-3,
    1e-30,
    1e30,
    TINY,
    2**-60,
    2**60,
    5e-7,
    11,
    1.5,
]


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scale", SCALES)
def test_every_bfloat16_is_rounded_and_saturated(dtype, scale):
    scale = np.full((1, 1), scale, np.float32)
    result = per_tensor_cast_to_fp8(BFLOAT16, scale, dtype=dtype)
    x = BFLOAT16.astype(np.float32)
    assert_same(result, divide(x, scale, dtype), scale)
    assert (np.isnan(np.asarray(result.data, np.float32)) == np.isnan(x)).all()
    assert np.isfinite(np.asarray(result.data, np.float32)[~np.isnan(x)]).all()


@pytest.mark.parametrize("dtype", FP8)
def test_every_bfloat16_as_the_largest_of_its_block(dtype):
    x = np.zeros((2**16, 3), ml_dtypes.bfloat16)
    x[:, 1] = BFLOAT16.reshape(-1)
    for scale_format in ("float32", "ue8m0"):
        result = per_token_cast_to_fp8(x, dtype=dtype, scale_format=scale_format)
        amax = abs(x[:, 1].astype(np.float32))
        scale = np.array([scale_of(a, dtype, scale_format == "ue8m0") for a in amax])[:, None]
        assert_same(result, divide(x, scale, dtype), scale)
        # Nothing overflows, and the largest is not cut.
        value = np.asarray(result.data[:, 1], np.float64) * np.asarray(result.scale[:, 0])
        normal = np.isfinite(amax) & (amax >= TINY * largest(dtype))
        np.testing.assert_allclose(
            value[normal],
            x[normal, 1].astype(np.float64),
            rtol=float(ml_dtypes.finfo(dtype).eps) / 2 * 1.0001,
        )


@pytest.mark.parametrize("dtype", FP8)
def test_ue8m0_is_rounded_up_at_every_exponent(dtype):
    top = largest(dtype)
    exponents = np.arange(-126, int(127 - np.log2(top)) + 1)
    exact = np.ldexp(top, exponents).astype(np.float32)
    x = np.zeros((3, len(exponents), 128), np.float32)
    x[0, :, 5] = exact
    x[1, :, 6] = np.nextafter(exact, np.float32(np.inf))
    x[2, :, 7] = -np.nextafter(exact, np.float32(0))
    scale = np.asarray(
        per_token_cast_to_fp8(x.reshape(-1, 128), dtype=dtype, scale_format="ue8m0").scale
    ).reshape(3, -1)
    np.testing.assert_array_equal(scale[0], np.ldexp(np.float32(1), exponents))
    np.testing.assert_array_equal(scale[1], np.ldexp(np.float32(1), exponents + 1))
    np.testing.assert_array_equal(scale[2], scale[0])


@pytest.mark.parametrize("shape", [(130, 513), (1, 1), (0, 100)])
@pytest.mark.parametrize("function", [per_token_cast_to_fp8, per_block_cast_to_fp8])
def test_packed_scales_are_the_exponents(function, shape):
    x = random_input(0, shape, jnp.float32)
    if x.size:
        x[0, 0] = np.nan
    result = function(x, scale_format="packed_ue8m0")
    wanted = function(x, scale_format="ue8m0")
    np.testing.assert_array_equal(
        np.asarray(result.data).view(np.uint8), np.asarray(wanted.data).view(np.uint8)
    )
    exponents = np.asarray(wanted.scale).view(np.uint32) >> 23
    rows, entries = exponents.shape
    padded = np.zeros((rows, -(-entries // 4) * 4), np.uint8)
    padded[:, :entries] = exponents
    np.testing.assert_array_equal(result.scale, padded.view("<i4"))
    np.testing.assert_array_equal(unpack_ue8m0(result.scale)[:, :entries], wanted.scale)
    np.testing.assert_array_equal(result.dequantize(), wanted.dequantize())


@each_cast
@pytest.mark.parametrize(("dtype", "scale_format"), FORMS)
def test_zeros_denormals_infinity_and_nan(function, dtype, scale_format):
    x = random_input(1, (260, 390))
    x[:128, :128] = 0
    x[:128, 128:256] *= ml_dtypes.bfloat16(0)
    x[:128, 256:384] = np.ldexp(1.0, -130)
    for at, value in {(130, 5): np.nan, (200, 200): np.inf, (259, 389): -np.inf}.items():
        x[at] = value
    result = jitted(function, dtype, scale_format)(x)
    block = block_of(function, x)
    assert_same(result, *cast(x, block, dtype, scale_format == "ue8m0"))
    value = np.asarray(result.dequantize())
    spoilt = np.zeros(x.shape, bool)
    for i, j in [(130, 5), (200, 200), (259, 389)]:
        i, j = i // block[0] * block[0], j // block[1] * block[1]
        spoilt[i : i + block[0], j : j + block[1]] = True
    np.testing.assert_array_equal(np.isnan(value), spoilt)
    if function is not per_tensor_cast_to_fp8:
        assert (value[:128, :384] == 0).all()
    zeros = function(np.zeros((3, 200), np.float32), dtype=dtype, scale_format=scale_format)
    assert (np.asarray(zeros.dequantize()) == 0).all()
    assert np.isfinite(np.asarray(zeros.scale)).all()


@pytest.mark.parametrize("function", [per_row_cast_to_fp8, per_tensor_cast_to_fp8])
def test_given_scale(function):
    x = random_input(2, (20, 70), jnp.float32)
    x[3, 3], x[4, 4], x[5, 5] = np.nan, np.inf, -1e30
    scale = np.full((20 if function is per_row_cast_to_fp8 else 1, 1), 0.25, np.float32)
    result = jax.jit(function)(x, scale)
    assert_same(result, divide(x, scale, FP8[0]), scale)
    assert np.asarray(result.data[4, 4], np.float32) == 448
    assert np.asarray(result.data[5, 5], np.float32) == -448
    assert np.isnan(np.asarray(result.data, np.float32)).sum() == 1


@pytest.mark.parametrize(("layout", "shape"), [("nk", (300, 520)), ("kn", (2, 130, 260))])
@pytest.mark.parametrize("scale_format", ["float32", "packed_ue8m0"])
def test_prepare_weight(layout, shape, scale_format):
    w = random_input(3, shape)
    given = w if layout == "nk" else np.swapaxes(w, -1, -2)
    prepare = functools.partial(prepare_weight, layout=layout, scale_format=scale_format)
    weight, transposed = jax.jit(functools.partial(prepare, transposed=True))(given)
    alone = jax.jit(prepare)(given)
    jax.tree.map(np.testing.assert_array_equal, alone, weight)
    for i in np.ndindex(shape[:-2]):
        data, scale = cast(w[i], (128, 128), round_up=scale_format != "float32")
        if scale_format == "float32":
            assert_same(weight[i], data, scale)
        np.testing.assert_array_equal(weight[i].dequantize(), ScaledArray(data, scale).dequantize())
    np.testing.assert_array_equal(
        transposed.dequantize(), jnp.swapaxes(weight.dequantize(), -1, -2)
    )


def test_what_is_cast_is_what_the_gemm_takes():
    x, w = random_input(4, (70, 400)), random_input(5, (300, 400))
    w = np.where(np.isfinite(w), w, 0)

    @jax.jit
    def layer(x, w):
        return fp8_gemm_nt(
            per_token_cast_to_fp8(x), prepare_weight(w), preferred_element_type=jnp.float32
        )

    a = ScaledArray(*cast(x, (1, 128))).dequantize()
    b = ScaledArray(*cast(w, (128, 128))).dequantize()
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(
        np.asarray(layer(x, w)), a @ b.T, rtol=1e-4, atol=1e-5 * float(abs(a @ b.T).max())
    )


X = jnp.ones((5, 256), jnp.bfloat16)


@each_cast
@pytest.mark.parametrize(
    ("x", "keywords", "error", "words"),
    [
        (X.astype(jnp.int32), {}, TypeError, ["x has dtype int32", "bfloat16"]),
        (X[0], {}, ValueError, ["x has shape (256,)", "2 dimensions [m k]"]),
        (X[:, :0], {}, ValueError, ["x has k = 0", "at least 1"]),
        (X, {"dtype": jnp.int8}, ValueError, ["dtype is int8", "float8_e5m2"]),
        (X, {"scale_format": "e8m0"}, ValueError, ["scale_format is 'e8m0'", "'packed_ue8m0'"]),
        (X, {"implementation": "gpu"}, ValueError, ["implementation is 'gpu'"]),
    ],
)
def test_bad_input(function, x, keywords, error, words):
    with pytest.raises(error, match=f"^{function.__name__}: ") as raised:
        jax.eval_shape(functools.partial(function, **keywords), x)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: per_channel_cast_to_fp8(X, scale_format="packed_ue8m0"), "packs blocks of 128"),
        (lambda: per_row_cast_to_fp8(X, scale_format="packed_ue8m0"), "packs blocks of 128"),
        (lambda: per_row_cast_to_fp8(X, jnp.ones((1, 1))), r"\(1, 1\), wanted \(5, 1\)"),
        (lambda: per_tensor_cast_to_fp8(X, jnp.ones((5, 1))), r"\(5, 1\), wanted \(1, 1\)"),
        (lambda: prepare_weight(X, layout="mn"), "layout is 'mn'"),
        (lambda: prepare_weight(X[0]), r"w has shape \(256,\)"),
    ],
)
def test_more_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@each_cast
def test_derivative_says_what_to_do_instead(function):
    with pytest.raises(NotImplementedError, match=f"{function.__name__} has no derivative.*Stop"):
        jax.grad(lambda x: function(x).dequantize().sum())(jnp.ones((2, 128)))


def test_examples_of_the_docstrings():
    assert doctest.testmod(quantize).failed == 0
