"""The router's choice against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deepgemm_jax.moe import drop_over_capacity, expert_load, route, update_bias

T, E = 40, 16


def best(x, k):
    """The k greatest, the earlier of equals first."""
    return np.argsort(-x, axis=-1, kind="stable")[..., :k]


def expected(logits, bias, top_k, score, n_group, topk_group, best_of_group, normalize, scale):
    x = logits.astype(np.float64)
    if score == "sigmoid":
        s = 1 / (1 + np.exp(-x))
    else:
        s = np.exp(x - x.max(-1, keepdims=True))
        s /= s.sum(-1, keepdims=True)
    choice = s + bias
    if n_group > 1:
        groups = choice.reshape(len(x), n_group, -1)
        of_group = np.sort(groups, -1)[..., -best_of_group:].sum(-1)
        allowed = np.zeros((len(x), n_group), bool)
        np.put_along_axis(allowed, best(of_group, topk_group), True, -1)
        choice = np.where(allowed[..., None], groups, -np.inf).reshape(x.shape)
    ids = best(choice, top_k)
    weights = np.take_along_axis(s, ids, -1)
    if normalize:
        weights /= weights.sum(-1, keepdims=True)
    return weights * scale, ids


@pytest.mark.parametrize(
    ("top_k", "score", "n_group", "topk_group", "best_of_group", "normalize", "scale"),
    [
        (2, "softmax", 1, 1, 2, True, 1.0),
        (4, "sigmoid", 4, 2, 2, True, 2.5),
        (3, "softmax", 8, 3, 1, False, 16.0),
    ],
    ids=["mixtral", "deepseek-v3", "deepseek-v2"],
)
def test_choice_and_weights(top_k, score, n_group, topk_group, best_of_group, normalize, scale):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(T, E)).astype(np.float32)
    bias = rng.normal(size=E).astype(np.float32) * 0.1
    how = {
        "top_k": top_k,
        "score": score,
        "n_group": n_group,
        "topk_group": topk_group,
        "best_of_group": best_of_group,
        "normalize": normalize,
        "scale": scale,
    }
    router = functools.partial(route, **how)
    weights, ids = jax.jit(router)(logits, bias)
    wanted, wanted_ids = expected(logits, bias, **how)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_allclose(weights, wanted, rtol=1e-5)

    # Of the weights, with respect to the logits, where the choice stays as it is.
    d = rng.normal(size=weights.shape)
    gradient = jax.jit(jax.grad(lambda x: (router(x, bias)[0] * d).sum()))(logits)
    step = 1e-4 * rng.normal(size=logits.shape)
    after, ids_after = expected(logits + step, bias, **how)
    before, ids_before = expected(logits - step, bias, **how)
    same = (ids_after == ids_before).all(-1)
    assert same.mean() > 0.9
    change = ((after - before) * d).sum(-1)[same]
    np.testing.assert_allclose((2 * step * gradient).sum(-1)[same], change, rtol=1e-2, atol=1e-7)


def test_scores_that_vanish_give_weights_without_nan():
    weights, _ = route(jnp.full((1, 4), -1e4), top_k=2, score="sigmoid")
    np.testing.assert_array_equal(weights, 0)


def test_what_does_not_fit_is_refused():
    logits = jnp.zeros((2, 12))
    with pytest.raises(ValueError, match="score is 'relu'"):
        route(logits, top_k=1, score="relu")
    with pytest.raises(ValueError, match="12 experts"):
        route(logits, top_k=1, n_group=5, topk_group=2)
    with pytest.raises(ValueError, match="12 experts"):
        route(logits, top_k=1, n_group=0)
    for top_k in (0, 7):
        with pytest.raises(ValueError, match=f"top_k is {top_k}, wanted 1 to the 6 of"):
            route(logits, top_k=top_k, n_group=4, topk_group=2)
    with pytest.raises(ValueError, match=r"route: logits has shape \(12,\), wanted \[T, E\]"):
        route(logits[0], top_k=1)
    with pytest.raises(ValueError, match=r"route: bias has shape \(3,\), wanted \(12,\)"):
        route(logits, jnp.zeros(3), top_k=1)
    with pytest.raises(TypeError, match="expert_load: experts has dtype float32, wanted integers"):
        expert_load(logits, 12)
    with pytest.raises(ValueError, match=r"load has shape \(3,\), wanted \(12,\) of the bias"):
        update_bias(jnp.zeros(12), jnp.zeros(3))


def test_capacity_load_and_bias():
    rng = np.random.default_rng(1)
    experts = rng.integers(-1, 5, size=(30, 3))
    load = np.bincount(experts[experts >= 0], minlength=5)
    np.testing.assert_array_equal(expert_load(experts, 5), load)
    kept = np.asarray(drop_over_capacity(experts, 5, capacity=7))
    np.testing.assert_array_equal(expert_load(kept, 5), np.minimum(load, 7))
    for expert in range(5):
        places = np.flatnonzero(experts.ravel() == expert)
        np.testing.assert_array_equal(kept.ravel()[places[:7]], expert)
        np.testing.assert_array_equal(kept.ravel()[places[7:]], -1)
    bias = update_bias(jnp.zeros(5), jnp.asarray(load), rate=0.25)
    np.testing.assert_array_equal(bias, 0.25 * np.sign(load.mean() - load))


def test_biases_of_many_layers():
    """Each layer's loads are compared with their own mean."""
    loads = np.array([[1, 3, 5], [30, 10, 50]])
    found = update_bias(jnp.zeros((2, 3)), loads, rate=0.5)
    np.testing.assert_array_equal(found, [[0.5, 0, -0.5], [0, 0.5, -0.5]])


def test_tokens_that_explicit_axes_divide(mesh):
    experts = np.random.default_rng(2).integers(-1, 5, size=(16, 3))
    both = jax.jit(lambda x: (expert_load(x, 5), drop_over_capacity(x, 5, capacity=7)))
    wanted = both(experts)
    with mesh(AxisType.Explicit):
        experts = jax.device_put(experts, P(("x", "y")))
        found = both(experts)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert jax.typeof(found[1]) == jax.typeof(experts)


def test_loads_are_compared_in_float32():
    """In bfloat16 these would be equal."""
    bias = update_bias(jnp.zeros(2, jnp.bfloat16), [1000, 1001], rate=0.5)
    assert bias.dtype == jnp.bfloat16
    np.testing.assert_array_equal(bias, [0.5, -0.5])
    np.testing.assert_array_equal(update_bias([0.0, 1.0], np.array([1, 3]), rate=0.5), [0.5, 0.5])
