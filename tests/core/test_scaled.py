import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import random_matrix

from deepgemm_jax import ScaledArray, scaled


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 1), (128, 1)])
@pytest.mark.parametrize("shape", [(256, 512), (130, 400), (1, 16)])
def test_dequantize(shape, block):
    rng = np.random.default_rng(0)
    data = rng.normal(size=shape).astype(jnp.float8_e4m3fn)
    entries = [-(-length // size) for length, size in zip(shape, block, strict=True)]
    scale = rng.lognormal(size=entries).astype(np.float32)
    wanted = np.empty(shape, np.float32)
    for i, j in np.ndindex(shape):
        wanted[i, j] = np.float32(data[i, j]) * scale[i // block[0], j // block[1]]
    np.testing.assert_array_equal(ScaledArray(data, scale).dequantize(), wanted)


def test_one_scale_for_all():
    data = np.ones((130, 400), jnp.float8_e4m3fn)
    x = ScaledArray(data, np.full((1, 1), 3, np.float32)).dequantize(jnp.bfloat16)
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, np.full((130, 400), 3))


def test_scale_of_another_shape():
    with pytest.raises(ValueError, match=r"scale has shape \(130, 3\).*wanted 400, 4 or 1"):
        ScaledArray(jnp.ones((130, 400)), jnp.ones((130, 3))).dequantize()
    with pytest.raises(ValueError, match=r"scale has shape \(130,\).*wanted 2 dimensions"):
        ScaledArray(jnp.ones((130, 400)), jnp.ones(130)).dequantize()


def test_is_a_pytree():
    x = random_matrix(np.random.default_rng(0), 64, 256, 1, batch=(3,))
    assert x.shape == (3, 64, 256)
    assert x.dtype == jnp.float8_e4m3fn
    each = jax.jit(jax.vmap(lambda x: x.dequantize()))(x)
    np.testing.assert_array_equal(each, x.dequantize())
    structure = jax.tree.structure(x)
    assert repr(jax.tree.unflatten(structure, [None, "no array"]))
    assert jax.tree.map(lambda leaf: leaf.shape, x) == ScaledArray((3, 64, 256), (3, 64, 2))


def test_examples_of_the_docstrings():
    assert doctest.testmod(scaled).failed == 0
