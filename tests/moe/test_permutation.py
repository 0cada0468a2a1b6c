"""Rows sorted by group, against NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deepgemm_jax import ScaledArray
from deepgemm_jax.moe import Permutation, permute, unpermute

T, K, G, H = 25, 3, 6, 256
ROUTINGS = {
    "random": lambda rng: rng.integers(0, G, size=(T, K)),
    "one group has all": lambda rng: np.full((T, K), 3),
    "some have none": lambda rng: rng.choice([1, 4], size=(T, K)),
    "some go nowhere": lambda rng: rng.integers(-2, G + 2, size=(T, K)),
    "all go nowhere": lambda rng: np.full((T, K), -1),
}
ROOMS = [(None, None), (100, None), (20, None), (None, 9)]  # rows, capacity


def expected(groups, rows, capacity):
    """Row of each slot, None for none, and the sizes."""
    place = np.full(groups.shape, -1)
    sizes = np.zeros(G, int)
    end = 0
    for g in range(G):
        start = end if capacity is None else g * capacity
        limit = rows if capacity is None else start + capacity
        for slot in np.flatnonzero(groups.ravel() == g):
            if start + sizes[g] < limit:
                place.ravel()[slot] = start + sizes[g]
                sizes[g] += 1
        end = start + sizes[g]
    return place, sizes


@functools.partial(jax.jit, static_argnums=(3, 4))
def everything(groups, x, weights, rows, capacity):
    plan = Permutation.of(groups, G, rows, capacity)
    sent = permute(x, plan)
    scaled = permute(ScaledArray(x.astype(jnp.float8_e4m3fn), x[:, :2]), plan)
    # What is in a row that is none's must not be seen.
    used = (plan.slot < groups.size)[:, None]
    poisoned = jnp.where(used, sent, jnp.nan)
    back = unpermute(poisoned, plan), unpermute(poisoned, plan, weights), unpermute(scaled, plan)
    cotangent = jnp.cos(jnp.arange(sent.size, dtype=jnp.float32)).reshape(sent.shape)
    d_x = jax.grad(lambda x: (permute(x, plan) * cotangent).sum())(x)
    d_rows, d_weights = jax.grad(
        lambda rows, weights: (unpermute(rows, plan, weights) * cotangent[:1]).sum(), (0, 1)
    )(poisoned, weights)
    return plan, sent, scaled, back, cotangent, d_x, d_rows, d_weights


@pytest.mark.parametrize(("rows", "capacity"), ROOMS, ids=["all", "more", "fewer", "capacity"])
def test_rows_and_sums(rows, capacity):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, H)).astype(np.float32)
    weights = rng.normal(size=(T, K)).astype(np.float32)
    count = G * capacity if capacity else rows or T * K
    for name, routing in ROUTINGS.items():
        groups = routing(rng)
        place, sizes = expected(groups, count, capacity)
        plan, sent, scaled, back, cotangent, d_x, d_rows, d_weights = jax.tree.map(
            np.asarray, everything(groups, x, weights, rows, capacity)
        )
        found = place >= 0
        np.testing.assert_array_equal(plan.row, np.where(found, place, count), name)
        np.testing.assert_array_equal(plan.group_sizes, sizes, name)
        np.testing.assert_array_equal(np.sort(plan.slot)[: found.sum()], np.flatnonzero(found))

        matrix = np.zeros((count, T))  # of the permutation
        matrix[place[found], np.nonzero(found)[0]] = 1
        np.testing.assert_array_equal(sent, matrix @ x, name)
        np.testing.assert_array_equal(scaled.scale, matrix @ x[:, :2], name)
        narrow = x.astype(jnp.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(scaled.data.astype(np.float32), matrix @ narrow, name)

        copies = found.sum(1, keepdims=True)
        scale = np.repeat(x[:, :2], 128, axis=1)
        np.testing.assert_allclose(back[0], copies * x, rtol=1e-6)
        total = (weights * found).sum(1, keepdims=True)
        np.testing.assert_allclose(back[1], total * x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(back[2], copies * narrow * scale, rtol=1e-6)

        np.testing.assert_allclose(d_x, matrix.T @ cotangent, rtol=1e-4, atol=1e-5)
        if count:
            own = np.zeros(count)
            own[place[found]] = weights[found]
            np.testing.assert_allclose(d_rows, own[:, None] * cotangent[:1], rtol=1e-5, atol=1e-6)
            wanted = np.where(found, (x @ cotangent[0])[:, None], 0)
            np.testing.assert_allclose(d_weights, wanted, rtol=1e-4, atol=1e-4)


def test_tokens_that_explicit_axes_divide(mesh):
    """Rows are whole on each device, what tokens have is divided as they are."""
    rng = np.random.default_rng(1)
    groups = rng.integers(-1, G, size=(24, K))
    x, weights = (rng.normal(size=(24, n)).astype(np.float32) for n in (H, K))
    wanted = everything(groups, x, weights, None, None)
    with mesh(AxisType.Explicit):
        operands = jax.device_put((groups, x, weights), (P("x"), P("x"), P(("x", "y"))))
        found = everything(*operands, None, None)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)
        plan, _, _, back, _, d_x, _, d_weights = found
        assert {jax.typeof(y).sharding.spec for y in (plan.row, *back)} == {P("x", None)}
        assert [jax.typeof(x) for x in (d_x, d_weights)] == [jax.typeof(x) for x in operands[1:]]


def test_what_does_not_fit_is_refused():
    plan = Permutation.of([[0, 1], [1, 0], [0, 0]], 2)
    with pytest.raises(TypeError, match="Permutation.of: groups has dtype float32, wanted int"):
        Permutation.of(jnp.zeros((3, 2)), 2)
    with pytest.raises(ValueError, match=r"Permutation.of: groups has shape \(3,\), wanted \[T, k"):
        Permutation.of([0, 1, 0], 2)
    with pytest.raises(ValueError, match="Permutation.of: capacity is -1, wanted at least 0"):
        Permutation.of([[0, 1]], 2, capacity=-1)
    with pytest.raises(ValueError, match=r"permute: x has shape \(2, 8\), wanted 3 rows"):
        permute(jnp.zeros((2, 8)), plan)
    x = jnp.zeros((3, 8), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\(3, 8\) with scales \(1, 1\), wanted 3 rows"):
        permute((x, jnp.ones((1, 1))), plan)
    with pytest.raises(ValueError, match=r"unpermute: rows has shape \(5, 8\), wanted 6 rows"):
        unpermute(jnp.zeros((5, 8)), plan)
    with pytest.raises(ValueError, match=r"unpermute: weights has shape \(2, 3\), wanted \(3, 2\)"):
        unpermute(jnp.zeros((6, 8)), plan, jnp.ones((2, 3)))


def test_pairs_and_weights_of_any_dtype():
    plan = Permutation.of([[0, 1], [1, 0], [0, 0]], 2)
    pair = jnp.ones((3, 8), jnp.float8_e4m3fn), jnp.array([[1.0], [2.0], [4.0]])
    rows = permute(pair, plan)
    weights = jnp.full((3, 2), 0.5, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        for sums in (
            unpermute((rows.data, rows.scale), plan, weights),
            unpermute(rows.dequantize(jnp.bfloat16), plan, weights),
        ):
            np.testing.assert_array_equal(sums[:, 0], [1, 2, 4])


def test_moves_as_many_bytes_as_there_are_rows():
    """Nothing of tokens × groups × hidden."""
    t, k, g, h = 512, 4, 64, 512

    def round_trip(groups, x):
        plan = Permutation.of(groups, g)
        return unpermute(permute(x, plan), plan)

    groups, x = jnp.zeros((t, k), jnp.int32), jnp.zeros((t, h), jnp.bfloat16)
    memory = jax.jit(round_trip).lower(groups, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * t * k * h
