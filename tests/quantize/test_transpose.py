"""quantize_transpose against the casts of NumPy, whole and in groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cast_oracles import FP8, assert_same, cast, random_input
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepgemm_jax import ScaledArray
from deepgemm_jax.quantize import quantize_transpose

M, K = 300, 130
quantize_groups = jax.jit(quantize_transpose)


@pytest.mark.parametrize("shape", [(300, 130), (1, 1), (0, 64)])
@pytest.mark.parametrize(("dtype", "scale_format"), [(FP8[0], "float32"), (FP8[1], "ue8m0")])
def test_both_forms(shape, dtype, scale_format):
    x = random_input(0, shape)
    plain, transposed = quantize_transpose(x, dtype=dtype, scale_format=scale_format)
    round_up = scale_format == "ue8m0"
    assert_same(plain, *cast(x, (1, 128), dtype, round_up))
    assert_same(transposed, *cast(x.T, (1, 128), dtype, round_up))


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(-5, 310), min_size=4, max_size=4))
@example(sizes=[0, 0, 0, 0])
@example(sizes=[128, 128, 44, 0])
@example(sizes=[1, 1, 1, 297])
@example(sizes=[0, 300, 0, 0])
@example(sizes=[2**31 - 1, 2**31 - 1, -(2**31), 5])
def test_groups(sizes):
    x = random_input(1, (M, K))
    plain, transposed, padded = quantize_groups(x, jnp.array(sizes, jnp.int32))
    ends = np.minimum(np.cumsum(np.clip(np.array(sizes, np.int64), 0, None)), M)
    starts = np.concatenate([[0], ends[:-1]])
    covered = x.copy()
    covered[ends[-1] :] = 0
    assert_same(plain, *cast(covered, (1, 128)))
    np.testing.assert_array_equal(padded, -(-(ends - starts) // 128) * 128)
    gathered = np.zeros((128 * (M // 128 + 4), K), x.dtype)
    at = 0
    for start, end in zip(starts, ends, strict=True):
        gathered[at : at + end - start] = x[start:end]
        at += -(-(end - start) // 128) * 128
    assert at == sum(padded) <= len(gathered)
    assert_same(transposed, *cast(gathered.T, (1, 128)))


def test_sizes_of_any_integers():
    x = random_input(1, (M, K))
    wanted = quantize_groups(x, jnp.array([5, M - 5]))
    for sizes in (np.array([5, 2**32 - 1], np.uint32), np.array([5, 2**15 - 1], np.int16)):
        for found, of_int32 in zip(
            jax.tree.leaves(quantize_groups(x, sizes)), jax.tree.leaves(wanted), strict=True
        ):
            np.testing.assert_array_equal(found, of_int32)


def test_groups_of_no_rows():
    _, transposed, padded = quantize_groups(np.zeros((0, K), np.float32), jnp.array([3, 0]))
    assert transposed.shape == (K, 256)
    assert not transposed.dequantize().any() and not padded.any()


def test_nan_stays_in_its_group():
    x = random_input(2, (M, K))
    x[100, 7] = np.nan
    _, transposed, _ = quantize_groups(x, jnp.array([101, 150, 10, 0]))
    spoilt = np.isnan(np.asarray(transposed.dequantize()))
    wanted = np.zeros(spoilt.shape, bool)
    wanted[7, :128] = True
    np.testing.assert_array_equal(spoilt, wanted)


def test_sizes_may_change_without_compiling_again():
    call = jax.jit(lambda x, sizes: quantize_transpose(x, sizes))
    for sizes in ([1, 2, 3], [0, 0, 0], [300, 0, 9]):
        call(random_input(3, (M, K)), jnp.array(sizes))
    assert call._cache_size() == 1


def test_the_gradient_of_each_groups_weight():
    x, dy = random_input(4, (M, K)).clip(-9, 9), random_input(5, (M, 70)).clip(-9, 9)
    sizes = np.array([77, 0, 200], np.int32)
    _, x_columns, padded = quantize_transpose(x, sizes)
    _, dy_columns, _ = quantize_transpose(dy, sizes)
    x_columns, dy_columns = (np.asarray(y.dequantize()) for y in (x_columns, dy_columns))
    at, start = 0, 0
    for size, width in zip(sizes, padded, strict=True):
        part = np.s_[at : at + int(width)]
        wanted = dy[start : start + size].astype(float).T @ x[start : start + size].astype(float)
        got = dy_columns[:, part] @ x_columns[:, part].T
        assert np.linalg.norm(got - wanted) <= 0.06 * np.linalg.norm(wanted)
        at, start = at + int(width), start + size


@pytest.mark.parametrize(
    ("x", "sizes", "error", "words"),
    [
        (
            jnp.ones((4, 4)),
            jnp.ones(2),
            TypeError,
            "group_sizes has dtype float32, wanted integers",
        ),
        (jnp.ones((4, 4)), jnp.ones((2, 2), int), ValueError, r"group_sizes has shape \(2, 2\)"),
        (jnp.ones((4, 4)), jnp.ones(0, int), ValueError, "at least one group"),
        (jnp.ones(4), jnp.ones(2, int), ValueError, r"x of shape \(4,\)"),
        (jnp.ones(4), None, ValueError, r"x has shape \(4,\), wanted 2 dimensions"),
        (jnp.ones((4, 4), int), jnp.ones(2, int), TypeError, "x has dtype int32"),
    ],
)
def test_bad_input(x, sizes, error, words):
    with pytest.raises(error, match=f"^quantize_transpose: .*{words}"):
        quantize_transpose(x, sizes)


def test_results_are_scaled_arrays():
    packed = quantize_transpose(jnp.ones((M, K)), scale_format="packed_ue8m0")
    assert [x.scale.shape for x in packed] == [(M, 1), (K, 1)]
    assert all(isinstance(x, ScaledArray) for x in packed)
    assert all((x.dequantize() == 1).all() for x in packed)
