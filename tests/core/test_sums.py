"""Running sums that are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgemm_jax._core.sums import rank, spans


@pytest.mark.parametrize("most", [0, 7, 2**29])  # of which five do not fit int32
def test_sums_are_cut(most):
    sizes = np.minimum(np.random.default_rng(0).integers(0, 2**30, (3, 5)), most)
    ends = np.cumsum(sizes, -1, dtype=np.int64)
    found = jax.jit(spans, static_argnums=1)(jnp.asarray(sizes, jnp.int32), most)
    for sums, expected in zip(found, (ends - sizes, ends), strict=True):
        assert sums.dtype == jnp.int32
        np.testing.assert_array_equal(sums, np.minimum(expected, most))


def test_rank_is_how_many_are_not_above():
    values = np.array([0, 3, 3, 9], np.int32)
    x = np.arange(-1, 11, dtype=np.int32)
    for of in x, x.reshape(3, 4), x[4]:
        found = rank(jnp.asarray(values), jnp.asarray(of))
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, np.searchsorted(values, of, side="right"))
    assert not rank(jnp.zeros(0, jnp.int32), jnp.asarray(x)).any()
