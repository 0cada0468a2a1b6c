"""The layer on one device."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from moe.cases import (
    BIASES,
    EXPERTS,
    TOKENS,
    TOP_K,
    dense,
    error,
    problem,
    router,
    value_and_gradients,
)

from deepgemm_jax import prepare_weight
from deepgemm_jax.moe import Axes, MoEParams, drop_over_capacity, moe_layer

# Relative, of rounding to 8 bits of mantissa and to FP8's 4.
TOLERANCE = {"bf16": 0.01, "fp8": 0.1}


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_result_and_gradients(recipe):
    x, params, d = problem(shared=128)
    valid = np.arange(TOKENS) % 7 != 3
    layer = functools.partial(moe_layer, router=router, recipe=recipe)
    both = value_and_gradients(lambda x, params, valid: layer(x, params, valid=valid))
    reference = value_and_gradients(dense)
    for name, bias in BIASES.items():
        params = dataclasses.replace(params, bias=jnp.asarray(bias, jnp.float32))
        (y, stats), gradients = both(x, params, d, valid)
        wanted, wanted_gradients = reference(x, params, d, valid)
        assert error(y, wanted) < TOLERANCE[recipe], name
        assert error(gradients, wanted_gradients) < 1.5 * TOLERANCE[recipe], name
        assert (np.asarray(y)[~valid] == 0).all()
        assert stats.load.sum() == valid.sum() * TOP_K
        assert stats.dropped == 0


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_serving(layout):
    """With weights in FP8, by blocks."""
    x, params, _ = problem(shared=128)
    layer = jax.jit(functools.partial(moe_layer, router=router, layout=layout))
    y, stats = layer(x.astype(jnp.bfloat16), params.quantize())
    assert y.dtype == jnp.bfloat16
    assert error(y, dense(x, params)) < TOLERANCE["fp8"]
    assert stats.dropped == 0


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_what_padding_holds_is_not_seen(recipe):
    x, params, d = problem(shared=128)
    valid = np.arange(TOKENS) % 7 != 3

    @jax.jit
    def run(x, params):
        def loss(x, params):
            return (moe_layer(x, params, router, valid=valid, recipe=recipe)[0] * d).sum()

        return jax.value_and_grad(loss, (0, 1))(x, params)

    wanted = run(np.where(valid[:, None], x, 0), params)
    for padding in (np.nan, 1e30):
        jax.tree.map(
            np.testing.assert_array_equal, run(np.where(valid[:, None], x, padding), params), wanted
        )


@pytest.mark.parametrize("served", [False, True])
def test_no_tokens(served):
    x, params, _ = problem(shared=128)
    y, stats = moe_layer(x[:0], params.quantize() if served else params, router)
    assert y.shape == (0, x.shape[1])
    assert not stats.load.any() and stats.dropped == 0


def test_export():
    x, params, _ = problem()
    layer = jax.jit(functools.partial(moe_layer, router=router, recipe="bf16"))
    exported = jax.export.deserialize(jax.export.export(layer)(x, params).serialize())
    (y, stats), (wanted, _) = exported.call(x, params), layer(x, params)
    np.testing.assert_array_equal(y, wanted)
    assert stats.dropped == 0


def test_masked_rows_are_multiplied_in_the_recipes_precision():
    """Weights that are arrays are quantised as those that serve."""
    x, params, _ = problem()
    layer = jax.jit(functools.partial(moe_layer, router=router, layout="masked"))
    y, _ = layer(x.astype(jnp.bfloat16), params)
    wanted, _ = layer(x.astype(jnp.bfloat16), params.quantize())
    np.testing.assert_array_equal(y, wanted)


def test_decoding_in_bfloat16_with_room_for_few():
    """Each expert has its first tokens, and the others do without."""
    x, params, _ = problem()
    factor = 4 * EXPERTS / (TOKENS * TOP_K)  # room for 4

    @jax.jit
    def layer(x, params):
        return moe_layer(x, params, router, layout="masked", recipe="bf16", capacity_factor=factor)

    y, stats = layer(x, params)
    assert stats.load.min() > 4
    assert stats.dropped == TOKENS * TOP_K - 4 * EXPERTS

    def limited(logits, bias):
        weights, experts = router(logits, bias)
        kept = drop_over_capacity(experts, EXPERTS, 4)
        return jnp.where(kept < 0, 0, weights), experts

    wanted, _ = jax.jit(lambda x: moe_layer(x, params, limited, recipe="bf16"))(x)
    assert error(y, wanted) < TOLERANCE["bf16"]


GATE_UP = r"wanted \[G, H, 2, I\] with G = 8, H = 256, I = 128"


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("router", lambda w: w[:128], ValueError, r"\(128, 8\), wanted \[H, E\] with H = 256"),
        ("bias", lambda w: w[:4], ValueError, r"\(4,\), wanted \[E\] with E = 8"),
        # Gate and up one after the other in each channel.
        ("w_gate_up", lambda w: np.swapaxes(w, 2, 3), ValueError, GATE_UP),
        ("w_gate_up", lambda w: w.reshape(8, 256, 256), ValueError, GATE_UP),
        ("w_down", lambda w: w[..., :64], ValueError, r"wanted \[G, I, H\] with H = 256"),
        ("shared_gate_up", lambda w: w[..., 0], ValueError, r"wanted \[H, 2, S\] with H = 256"),
        ("shared_down", lambda w: None, TypeError, "are of two kinds"),
        ("w_down", lambda w: prepare_weight(w, layout="kn"), TypeError, "are of two kinds"),
    ],
)
def test_weights_that_do_not_fit(name, change, error, message):
    x, params, _ = problem(shared=128)
    params = dataclasses.replace(params, **{name: change(getattr(params, name))})
    with pytest.raises(error, match=f"moe_layer: params.*{name}.* {message}"):
        moe_layer(x, params, router)


def test_axes():
    assert Axes(tokens="data", expert="expert").token_spec() == P(("data", "expert"))
    with pytest.raises(ValueError, match="Axes: x, x, wanted each mesh axis once"):
        Axes(expert="x", tensor="x")
    with pytest.raises(ValueError, match="Axes: fsdp is 'y', wanted one of tokens"):
        Axes(tokens="x", fsdp="y")


def test_what_does_not_fit_is_refused():
    x, params, _ = problem()
    with pytest.raises(ValueError, match="strategy is scatter, wanted all_gather"):
        moe_layer(x, params, router, strategy="scatter", axes=Axes(expert="expert"))
    with pytest.raises(ValueError, match="layout is 'dense'"):
        moe_layer(x, params, router, layout="dense")
    with pytest.raises(ValueError, match="wanted one or one each"):
        moe_layer(x, params, router, strategy="all_gather")
    with pytest.raises(ValueError, match="wanted one or one each"):
        moe_layer(x, params, router, axes=Axes(expert="expert"))
    more = dataclasses.replace(params, router=jnp.zeros((256, 12)), bias=None)
    with pytest.raises(ValueError, match="8 experts on each of 1 shards, router has 12"):
        moe_layer(x, more, router)
    with pytest.raises(ValueError, match=r"valid has shape \(3,\), wanted \(48,\)"):
        moe_layer(x, params, router, valid=np.ones(3, bool))
    with pytest.raises(TypeError, match="valid has dtype int32, wanted bool"):
        moe_layer(x, params, router, valid=np.full(TOKENS, 2))
    with pytest.raises(ValueError, match="dispatch_dtype is float8_e5m2, wanted one of float8_e4m"):
        moe_layer(x, params, router, dispatch_dtype=jnp.float8_e5m2)
    with pytest.raises(ValueError, match="combine_dtype is int8, wanted one of float8_e4m3fn"):
        moe_layer(x, params, router, combine_dtype="int8")
    with pytest.raises(ValueError, match="chunks is 0"):
        moe_layer(x, params, router, chunks=0)
    with pytest.raises(ValueError, match="capacity_factor is 0"):
        moe_layer(x, params, router, capacity_factor=0)
    with pytest.raises(ValueError, match=r"x has shape \(1, 48, 256\), wanted \[T, H\]"):
        moe_layer(x[None], params, router)
    with pytest.raises(ValueError, match="axes have 'expert', wanted axes of a jax.shard_map"):
        moe_layer(x, params, router, strategy="all_gather", axes=Axes(expert="expert"))
    with pytest.raises(TypeError, match="router gives experts of float32, wanted integers"):
        moe_layer(x, params, lambda *args: router(*args)[::-1])
    with pytest.raises(
        ValueError, match=r"router gives weights \(1, 2\) and experts \(1, 2\), .*48"
    ):
        moe_layer(x, params, lambda *_: (jnp.ones((1, 2)), jnp.zeros((1, 2), int)))
    small = MoEParams.init(jax.random.key(0), hidden=64, intermediate=64, experts=2)
    with pytest.raises(ValueError, match="multiples of 128"):
        small.quantize()
