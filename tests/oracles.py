"""Random block-scaled matrices, and what their product must be. NumPy alone, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgemm_jax import ScaledArray

BLOCK = 128
FLOAT8 = jnp.float8_e4m3fn

# Where an op's tests run: on the CPU, where plain JAX is the op, and on a GPU, where a kernel is.
on_each_platform = pytest.mark.parametrize(
    "platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)

# Relative to the sum of the terms' magnitudes. The tensor core aligns the products that it adds to
# the largest of them and keeps 13 bits or so, which loses most where one outweighs all others.
TOLERANCE = {"cpu": 2e-6, "cuda": 2**-9}


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A product in float64, and the sum of its terms' magnitudes, to which errors are relative."""

    value: np.ndarray
    magnitude: np.ndarray


def product(a, b, c=None) -> Oracle:
    """C + A Bᵀ for A scaled by (1, 128) and B by (128, 128); block by block, as it is defined, so
    that infinity and NaN come out where the definition puts them."""
    (a, a_scale), (b, b_scale) = (
        (np.asarray(x.data, np.float64), np.asarray(x.scale, np.float64)) for x in (a, b)
    )
    b_scale = np.repeat(b_scale, BLOCK, axis=-2)[..., : b.shape[-2], :]
    value = 0.0 if c is None else np.asarray(c, np.float64)
    magnitude = abs(value)
    with np.errstate(invalid="ignore"):
        for block in range(a_scale.shape[-1]):
            columns = np.s_[..., block * BLOCK : (block + 1) * BLOCK]
            entry = np.s_[..., block : block + 1]
            scale = a_scale[entry] * np.swapaxes(b_scale[entry], -1, -2)
            a_part, b_part = a[columns], np.swapaxes(b[columns], -1, -2)
            value = value + (a_part @ b_part) * scale
            magnitude = magnitude + (abs(a_part) @ abs(b_part)) * abs(scale)
    return Oracle(value, magnitude)


def assert_close(d, oracle: Oracle, platform: str = "cpu") -> None:
    """Every element is the oracle's, but for the result's rounding and float32's in the sum."""
    rounding = float(jnp.finfo(d.dtype).eps) / 2
    d = np.asarray(d, np.float64)
    assert d.shape == oracle.value.shape
    finite = np.isfinite(oracle.value)
    np.testing.assert_array_equal(d[~finite], oracle.value[~finite])
    value, magnitude = oracle.value[finite], oracle.magnitude[finite]
    excess = abs(d[finite] - value) - rounding * abs(value) - TOLERANCE[platform] * magnitude
    assert (excess <= 0).all(), f"{(excess > 0).sum()} elements are off by up to {excess.max()}"


def difference(x, y) -> float:
    """DeepGEMM's measure of two results: 0 where they are equal, 1 where they are orthogonal."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return 1 - 2 * (x * y).sum() / (x * x + y * y).sum()


def random_matrix(rng, rows: int, columns: int, block_rows: int, batch=()) -> ScaledArray:
    """Normal numbers with what a quantised matrix may hold among them: zeros, denormals and
    outliers, whole blocks of zeros, and scales that differ by powers of ten."""
    data = rng.normal(size=(*batch, rows, columns))
    kind = rng.random(data.shape)
    data = np.where(kind < 0.02, 0, data)
    data = np.where((kind > 0.02) & (kind < 0.05), data * 2**-8, data)
    data = np.where(kind > 0.995, np.copysign(448, data), data)
    shape = (*batch, -(-rows // block_rows), -(-columns // BLOCK))
    scale = rng.lognormal(size=shape, sigma=2) * (rng.random(shape) > 0.05)
    return ScaledArray(data.astype(FLOAT8), scale.astype(np.float32))


def random_problem(seed: int, m: int, n: int, k: int, batch=()) -> tuple[ScaledArray, ScaledArray]:
    rng = np.random.default_rng(seed)
    return random_matrix(rng, m, k, 1, batch), random_matrix(rng, n, k, BLOCK, batch)


def random_like(seed: int, m: int, n: int, k: int, dtype, batch=()) -> np.ndarray:
    """A C of about the size that the product of a random problem has."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(*batch, m, n)) * k**0.5).astype(dtype)


def quantize(x: np.ndarray, block_rows: int) -> ScaledArray:
    """The nearest block-scaled matrix; the dims of x must be whole blocks."""
    rows, columns = x.shape
    blocks = x.reshape(rows // block_rows, block_rows, columns // BLOCK, BLOCK)
    scale = abs(blocks).max(axis=(1, 3), keepdims=True) / 448
    return ScaledArray(
        (blocks / scale).reshape(x.shape).astype(FLOAT8),
        scale.reshape(rows // block_rows, columns // BLOCK).astype(np.float32),
    )


def put(tree, platform: str):
    return jax.device_put(tree, jax.local_devices(backend=platform)[0])
