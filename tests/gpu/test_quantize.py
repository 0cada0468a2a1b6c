"""The quantising and transposing kernels on a GPU, against NumPy and against plain JAX on a CPU."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cast_oracles import (
    FP8,
    assert_close,
    assert_same,
    cast,
    divide,
    largest,
    random_input,
    scale_of,
)
from oracles import put

from deepgemm_jax import layout_transpose
from deepgemm_jax.quantize import (
    activation_quantize,
    activation_quantize_backward,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_row_cast_to_fp8,
    per_tensor_cast_to_fp8,
    per_token_cast_to_fp8,
    quantize_transpose,
    swiglu_quantize,
    swiglu_quantize_backward,
)

pytestmark = pytest.mark.gpu

# None is the whole length.
CASTS = {
    per_token_cast_to_fp8: (1, 128),
    per_channel_cast_to_fp8: (128, 1),
    per_block_cast_to_fp8: (128, 128),
    per_row_cast_to_fp8: (1, None),
    per_tensor_cast_to_fp8: (None, None),
}
FORMS = [(jnp.bfloat16, FP8[0], "float32"), (jnp.float32, FP8[1], "ue8m0")]
each_form = pytest.mark.parametrize(("x_dtype", "dtype", "scale_format"), FORMS)


def kernel(function, **keywords):
    return jax.jit(functools.partial(function, implementation="cuda", **keywords))


def plain(function, *operands, **keywords):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(functools.partial(function, **keywords))(*put(operands, "cpu"))


def assert_all_same(results, wanted):
    for result, want in zip(results, wanted, strict=True):
        assert_same(result, want.data, want.scale)


BFLOAT16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
SCALES = [1, 2, 0.5, 1 / 448, 1 / 3, 3, 0.1, 7.3e-3, 1e-30, 1e30, 2**-100, 2**60, 5e-7, 11, 1.5, 77]


@pytest.mark.parametrize("dtype", FP8)
def test_every_bfloat16_is_rounded_and_saturated(dtype):
    x = BFLOAT16.reshape(256, 256)
    for scale in SCALES:
        of_all = np.full((1, 1), scale, np.float32)
        result = kernel(per_tensor_cast_to_fp8, dtype=dtype)(x, of_all)
        assert_same(result, divide(x.astype(np.float32), of_all, dtype), of_all)
        of_rows = np.float32(scale) * np.geomspace(1, 8, 256, dtype=np.float32)[:, None]
        result = kernel(per_row_cast_to_fp8, dtype=dtype)(x, of_rows)
        assert_same(result, divide(x.astype(np.float32), of_rows, dtype), of_rows)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", FP8)
def test_every_bfloat16_under_many_scales(dtype, scale_format):
    """One in each block of 128 gives the scale; the others are all numbers that are no larger."""
    cast_rows = kernel(per_token_cast_to_fp8, dtype=dtype, scale_format=scale_format)
    for scale in SCALES:
        amax = np.float32(scale * largest(dtype)).astype(ml_dtypes.bfloat16)
        x = np.zeros((2**16 // 64, 128), ml_dtypes.bfloat16)
        smaller = abs(BFLOAT16.astype(np.float32)) <= amax.astype(np.float32)
        x[:, :64] = np.where(smaller, BFLOAT16, 0).reshape(-1, 64)
        x[:, 64] = -amax
        of_all = scale_of(amax.astype(np.float32), dtype, scale_format == "ue8m0")
        scales = np.full((len(x), 1), of_all, np.float32)
        assert_same(cast_rows(x), divide(x.astype(np.float32), scales, dtype), scales)


@pytest.mark.parametrize("dtype", FP8)
def test_every_bfloat16_as_the_largest_of_its_block(dtype):
    x = np.zeros((2**16, 8), ml_dtypes.bfloat16)
    x[:, 3] = BFLOAT16
    for scale_format in ("float32", "ue8m0"):
        keywords = {"dtype": dtype, "scale_format": scale_format}
        result = kernel(per_token_cast_to_fp8, **keywords)(x)
        assert_all_same([result], [plain(per_token_cast_to_fp8, x, **keywords)])


@pytest.mark.parametrize("dtype", FP8)
def test_ue8m0_is_rounded_up_at_every_exponent(dtype):
    """The largest magnitude of a row is a power of two of `dtype`'s largest number, one float32
    above that, and one below."""
    top = largest(dtype)
    exact = np.ldexp(top, np.arange(-126, int(127 - np.log2(top)) + 1)).astype(np.float32)
    above, below = (np.nextafter(exact, np.float32(to)) for to in (np.inf, 0))
    x = np.zeros((3 * len(exact), 128), np.float32)
    x[:, 5] = np.concatenate([exact, above, -below])
    for scale_format in ("ue8m0", "packed_ue8m0"):
        keywords = {"dtype": dtype, "scale_format": scale_format}
        result = kernel(per_token_cast_to_fp8, **keywords)(x)
        assert_all_same([result], [plain(per_token_cast_to_fp8, x, **keywords)])


@each_form
@pytest.mark.parametrize("function", [*CASTS, quantize_transpose])
def test_zeros_denormals_infinity_and_nan(function, x_dtype, dtype, scale_format):
    x = random_input(1, (272, 392), x_dtype)
    x[:128, :128] = 0
    x[:128, 128:256] = -0.0
    x[:128, 256:384] = np.ldexp(1.0, -130)
    for at, value in {(130, 5): np.nan, (200, 200): np.inf, (271, 391): -np.inf}.items():
        x[at] = value
    keywords = {"dtype": dtype, "scale_format": scale_format}
    results, wanted = kernel(function, **keywords)(x), plain(function, x, **keywords)
    if function is not quantize_transpose:
        results, wanted = [results], [wanted]
    assert_all_same(results, wanted)
    if function is not per_tensor_cast_to_fp8:
        assert (np.asarray(results[0].dequantize())[:128, :384] == 0).all()


@each_form
@pytest.mark.parametrize("shape", [(304, 392), (8, 8), (1041, 1024)])
@pytest.mark.parametrize("function", CASTS)
def test_casts(function, shape, x_dtype, dtype, scale_format):
    x = random_input(0, shape, x_dtype)
    x[5, 5], x[1, -1] = np.nan, np.inf
    result = kernel(function, dtype=dtype, scale_format=scale_format)(x)
    block = [size or n for size, n in zip(CASTS[function], shape, strict=True)]
    assert_same(result, *cast(x, block, dtype, scale_format == "ue8m0"))


@each_form
@pytest.mark.parametrize("shape", [(304, 392), (16, 8), (1040, 1024)])
def test_quantize_transpose(shape, x_dtype, dtype, scale_format):
    x = random_input(0, shape, x_dtype)
    x[5, 5], x[1, -1] = np.nan, np.inf
    keywords = {"dtype": dtype, "scale_format": scale_format}
    results = kernel(quantize_transpose, **keywords)(x)
    assert_all_same(results, plain(quantize_transpose, x, **keywords))


@pytest.mark.parametrize(
    "sizes",
    [
        [0, 0, 0, 0],
        [128, 128, 44, 0],
        [1, 1, 1, 297],
        [2**31 - 1, 2**31 - 1, -(2**31), 5],
        [100, 0, -3, 77],
        [3] * 40 + [0] * 30 + [100],
    ],
)
def test_groups(sizes):
    x, sizes = random_input(1, (304, 392)), np.array(sizes, np.int32)
    *results, padded = kernel(quantize_transpose)(x, sizes)
    *wanted, wanted_padded = plain(quantize_transpose, x, sizes)
    assert_all_same(results, wanted)
    np.testing.assert_array_equal(padded, wanted_padded)


def test_batches():
    x = random_input(2, (3, 304, 136))
    for function in CASTS:
        result = jax.vmap(kernel(function))(x)
        assert_all_same([result], [plain(jax.vmap(function), x)])
    sizes = np.array([[3, 200, 5], [0, 0, 0], [304, 1, 1]], np.int32)
    *results, _ = jax.vmap(kernel(quantize_transpose))(x, sizes)
    *wanted, _ = plain(jax.vmap(quantize_transpose), x, sizes)
    assert_all_same(results, wanted)


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("forward", "backward", "parts"),
    [
        (swiglu_quantize, swiglu_quantize_backward, 2),
        (activation_quantize, activation_quantize_backward, 1),
    ],
)
def test_activations(forward, backward, parts, activation, x_dtype):
    rng = np.random.default_rng(0)
    m, h = 301, 384
    x = (rng.normal(size=(m, parts * h)) * 3).astype(x_dtype)
    dy = rng.normal(size=(m, h)).astype(x_dtype)
    weights = rng.random(m).astype(np.float32)
    for given in ((), (weights,)):
        y = kernel(forward, activation=activation)(x, *given)
        assert_close(y, plain(forward, x, *given, activation=activation))
        dx, dw = kernel(backward, activation=activation)(x, dy, *given)
        wanted_dx, wanted_dw = plain(backward, x, dy, *given, activation=activation)
        assert_close(dx, wanted_dx)
        if given:
            np.testing.assert_allclose(dw, wanted_dw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.int8, FP8[1], jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("shape", [(16, 16), (304, 400), (3, 1040, 528)])
def test_transpose(shape, dtype):
    x = np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)
    y = np.asarray(kernel(layout_transpose)(x))
    np.testing.assert_array_equal(y, np.swapaxes(x, -1, -2))


def test_every_element_is_written():
    x = put(random_input(3, (272, 136)), "cuda")
    sizes = put(np.array([100, 30], np.int32), "cuda")
    quantize = kernel(quantize_transpose).lower(x, sizes).compile()
    wanted = plain(quantize_transpose, x, sizes)
    for poison in (np.nan, 1e30):
        # XLA gives out last what it got back last.
        blocks = [jnp.full(y.shape, poison, y.dtype) for y in jax.tree.leaves(wanted[:2])]
        jax.block_until_ready(put(blocks, "cuda"))
        del blocks
        assert_all_same(quantize(x, sizes)[:2], wanted[:2])
