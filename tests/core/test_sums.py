"""Running sums that are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgemm_jax._core.sums import ends


@pytest.mark.parametrize("most", [0, 7, 2**29])  # of which five do not fit int32
def test_sums_are_cut(most):
    sizes = np.minimum(np.random.default_rng(0).integers(0, 2**30, (3, 5)), most)
    expected = np.minimum(np.cumsum(sizes, -1, dtype=np.int64), most)
    found = jax.jit(ends, static_argnums=1)(jnp.asarray(sizes, jnp.int32), most)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
