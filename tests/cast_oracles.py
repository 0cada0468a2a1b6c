"""What a cast to FP8 must give, in NumPy and ml_dtypes, one block at a time."""

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np

TINY = np.float32(2**-126)
FP8 = [jnp.float8_e4m3fn, jnp.float8_e5m2]


def largest(dtype) -> np.float32:
    return np.float32(ml_dtypes.finfo(dtype).max)


def divide(x, scale, dtype):
    """x over the scale in `dtype`, as float32 computes it; ml_dtypes rounds, saturating."""
    x = np.where(abs(x) < TINY, 0, x).astype(np.float32)
    with np.errstate(all="ignore"):
        y = np.clip(x * (np.float32(1) / np.float32(scale)), -largest(dtype), largest(dtype))
        return y.astype(dtype)


def scale_of(block, dtype, round_up: bool) -> np.float32:
    amax = np.float32(abs(block).max(initial=0))
    if not np.isfinite(amax):
        return np.float32(np.nan)
    scale = max(amax * (np.float32(1) / largest(dtype)), TINY)
    if round_up:
        fraction, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    return np.float32(scale)


def cast(x, block, dtype=FP8[0], round_up: bool = False):
    """Data and scale of a matrix."""
    x = np.asarray(x, np.float32)
    entries = [-(-length // size) for length, size in zip(x.shape, block, strict=True)]
    data, scale = np.empty(x.shape, dtype), np.empty(entries, np.float32)
    for at in itertools.product(*map(range, entries)):
        part = tuple(slice(i * size, (i + 1) * size) for i, size in zip(at, block, strict=True))
        scale[at] = scale_of(x[part], dtype, round_up)
        data[part] = divide(x[part], scale[at], dtype)
    return data, scale


def assert_same(result, data, scale) -> None:
    """Bit for bit, but for which NaN it is."""
    for got, wanted in [(result.data, data), (result.scale, scale)]:
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        got, wanted = np.asarray(got), np.asarray(wanted)
        bits = f"u{wanted.dtype.itemsize}"
        nan = np.isnan(wanted.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
        np.testing.assert_array_equal(
            np.where(nan, 0, got.view(bits)), np.where(nan, 0, wanted.view(bits))
        )


def assert_close(result, wanted) -> None:
    """But for what an activation loses, which may show where a number is between two of FP8's."""
    np.testing.assert_allclose(result.scale, wanted.scale, rtol=1e-5)
    got, expected = (np.asarray(x.data).astype(np.float32) for x in (result, wanted))
    eps = float(ml_dtypes.finfo(wanted.dtype).eps)
    tiny = float(ml_dtypes.finfo(wanted.dtype).smallest_subnormal)
    np.testing.assert_allclose(got, expected, rtol=eps * 1.01, atol=tiny)
    assert np.mean(got != expected) < 0.01


def random_input(seed: int, shape, dtype=jnp.bfloat16) -> np.ndarray:
    """Normal numbers with zeros, denormals and outliers among them, and some rows of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.lognormal(size=(*shape[:-1], 1), sigma=4)
    kind = rng.random(shape)
    x = np.where(kind < 0.02, 0, x)
    x = np.where((kind > 0.02) & (kind < 0.04), x * 2**-130, x)
    x = np.where(kind > 0.998, x * 1000, x)
    x *= rng.random((*shape[:-1], 1)) > 0.05
    return x.astype(dtype)
