"""The layer on meshes of eight CPU devices: every strategy gives what one device gives."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe.cases import (
    BIASES,
    HIDDEN,
    TOKENS,
    TOP_K,
    dense,
    error,
    problem,
    router,
    value_and_gradients,
)

from deepgemm_jax.moe import Axes, MoEParams, moe_layer
from deepgemm_jax.moe.exchange import FALLBACK

FSDP = Axes(expert="y", tokens=("x",), fsdp="x")
TENSOR = Axes(expert="y", tensor="x")
MACHINES = Axes(expert=("x", "y"))


def sharded(axes, params, **options):
    """The layer of arrays on the current mesh, checked for what varies where."""
    layer = functools.partial(moe_layer, router=router, axes=axes)
    tokens = axes.token_spec()
    return jax.shard_map(
        lambda x, params, valid: layer(x, params, valid=valid, **options),
        in_specs=(tokens, axes.param_specs(params), tokens),
        out_specs=(tokens, P()),
        check_vma=True,
    )


def put(x, params, d, *more, axes):
    specs = (axes.token_spec(), axes.param_specs(params), *[axes.token_spec()] * (1 + len(more)))
    shardings = jax.tree.map(lambda spec: NamedSharding(jax.sharding.get_mesh(), spec), specs)
    return jax.device_put((x, params, d, *more), shardings)


@pytest.fixture(scope="module")
def one_device():
    """Results and gradients on one device, of each case, tokens of no worth among them."""
    x, params, d = problem(shared=128)
    valid = np.arange(TOKENS) < TOKENS - 5
    both = value_and_gradients(
        lambda x, params, valid: moe_layer(x, params, router, valid=valid, recipe="bf16")
    )
    cases = {}
    for name, bias in BIASES.items():
        params = dataclasses.replace(params, bias=jnp.asarray(bias, jnp.float32))
        operands = x, params, d, valid
        cases[name] = operands, both(*operands)
    return cases


@pytest.mark.parametrize(
    ("strategy", "axes", "kind", "chunks"),
    [
        ("all_gather", TENSOR, AxisType.Explicit, 2),
        ("all_to_all", FSDP, AxisType.Auto, 1),
        ("ragged_all_to_all", FSDP, AxisType.Explicit, 1),
        (("all_to_all", "all_gather"), MACHINES, AxisType.Auto, 1),
    ],
)
def test_result_and_gradients(mesh, one_device, strategy, axes, kind, chunks):
    with mesh(kind):
        both = None
        for name, (operands, wanted) in one_device.items():
            operands = put(*operands, axes=axes)
            both = both or value_and_gradients(
                sharded(axes, operands[1], strategy=strategy, recipe="bf16", chunks=chunks)
            )
            (y, stats), gradients = both(*operands)
            (wanted_y, wanted_stats), wanted_gradients = wanted
            # The products are in bfloat16, and their terms may be added in another order.
            assert error(y, wanted_y) < 1e-3, name
            assert error(gradients, wanted_gradients) < 1e-3, name
            np.testing.assert_array_equal(stats.load, wanted_stats.load)
            assert stats.dropped == 0


EXPLICIT = (AxisType.Explicit,)


@pytest.mark.parametrize(
    ("kinds", "tokens", "axes", "options"),
    [
        (EXPLICIT, "x", Axes(), {}),
        (EXPLICIT, None, MACHINES, {"strategy": ("all_to_all", "all_gather")}),
        (EXPLICIT, ("x", "y"), TENSOR, {}),
        (EXPLICIT, "x", FSDP, {"axes": FSDP, "strategy": "all_to_all"}),
        ((AxisType.Auto, AxisType.Explicit), "y", Axes(expert="y"), {}),
    ],
)
def test_arrays_that_explicit_axes_divide(mesh, one_device, kinds, tokens, axes, options):
    """Without a `shard_map`, however tokens and weights lie."""
    (x, params, d, valid), (wanted, wanted_gradients) = one_device["as it comes"]
    with mesh(*kinds):
        x, d, valid = jax.device_put((x, d, valid), P(tokens))
        params = jax.device_put(params, axes.param_specs(params))
        layer = functools.partial(moe_layer, router=router, recipe="bf16", **options)
        both = value_and_gradients(lambda x, params, valid: layer(x, params, valid=valid))
        (y, stats), gradients = both(x, params, d, valid)
        assert error(y, wanted[0]) < 1e-3
        assert error(gradients, wanted_gradients) < 1e-3
        np.testing.assert_array_equal(stats.load, wanted[1].load)
        assert stats.dropped == 0
        assert jax.tree.map(jax.typeof, (y, *gradients)) == jax.tree.map(jax.typeof, (x, x, params))


def test_batches_that_explicit_axes_divide(mesh, one_device):
    (x, params, d, _), _ = one_device["as it comes"]

    def gradient(x, params, d):
        layer = functools.partial(moe_layer, router=router, recipe="bf16")
        return jax.grad(lambda x: (layer(x, params)[0] * d).sum())(x)

    each = jax.jit(jax.vmap(gradient, (0, None, 0)))
    x, d = np.stack([x, x[::-1]]), np.stack([d, d])
    wanted = each(x, params, d)
    with mesh(*EXPLICIT):
        x, d = jax.device_put((x, d), P("x"))
        found = each(x, jax.device_put(params, Axes(expert="y").param_specs(params)), d)
        assert error(found, wanted) < 1e-3
        assert jax.typeof(found) == jax.typeof(x)


def test_tokens_that_cannot_be_divided(mesh):
    x, params, _ = problem()
    with mesh(*EXPLICIT):
        params = jax.device_put(params, Axes(expert="y").param_specs(params))
        with pytest.raises(ValueError, match=r"47 tokens cannot be divided by 4 .* \('y',\): pad"):
            moe_layer(x[:47], params, router)


def test_fp8_on_the_wire_both_ways(mesh):
    x, params, d = problem()
    valid = np.ones(TOKENS, bool)
    wanted = value_and_gradients(dense)(x, params, d, valid)
    with mesh(AxisType.Auto):
        operands = put(x, params, d, valid, axes=TENSOR)
        both = value_and_gradients(
            sharded(TENSOR, params, strategy="all_to_all", combine_dtype="float8_e4m3fn")
        )
        lowered = both.lower(*operands)
        (y, _), gradients = lowered.compile()(*operands)
    assert error(y, wanted[0]) < 0.1
    assert error(gradients, wanted[1]) < 0.15
    # Experts and weights go ahead. Rows are of words, data with their scales, each filled up to
    # four.
    row = HIDDEN // 4 + 4
    sent = re.findall(r"all_to_all.* tensor<\d+x(\w+)>\n", lowered.as_text())
    assert sorted(sent) == ["3xf32", *[f"{row}xi32"] * 4, "8xi32"]


@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all", "ragged_all_to_all"])
def test_fewer_tokens_than_chunks(mesh, one_device, strategy):
    """On each device: none, or one."""
    (x, params, d, valid), ((wanted, _), _) = one_device["as it comes"]
    with mesh(AxisType.Auto):
        for tokens in (0, 8):
            operands = put(x[:tokens], params, d[:tokens], valid[:tokens], axes=FSDP)
            layer = sharded(FSDP, params, strategy=strategy, recipe="bf16", chunks=3)
            (y, stats), gradients = value_and_gradients(layer)(*operands)
            assert error(y, wanted[:tokens]) < 1e-3
            assert np.isfinite(gradients[1].w_down).all()
            assert stats.load.sum() == tokens * TOP_K


def to_one_expert(logits, bias):
    return jnp.ones((len(logits), 1)), jnp.full((len(logits), 1), 2)


@pytest.fixture(scope="module")
def served():
    """Weights to serve, and what one device makes of tokens that all go to one expert."""
    x, params, _ = problem()
    params = jax.jit(MoEParams.quantize)(params)
    y, _ = jax.jit(lambda x, params: moe_layer(x, params, to_one_expert))(x, params)
    return x, params, np.asarray(y)


# Of 6 tokens of each device there is room for 12 of a shard's 24.
FIRST_ARRIVED = np.arange(24) < 12
FIRST_OF_EACH = np.arange(24) % 6 < 3


@pytest.mark.parametrize(
    ("strategy", "layout", "factor", "kept"),
    [
        ("all_gather", "contiguous", 2, FIRST_ARRIVED),
        ("all_to_all", "contiguous", 2, FIRST_OF_EACH),
        # Here it is the expert, one of eight, that has no room.
        ("all_to_all", "masked", 4, FIRST_ARRIVED),
        ("ragged_all_to_all", "contiguous", 2, FIRST_ARRIVED),
    ],
)
def test_what_finds_no_room_adds_nothing(mesh, served, strategy, layout, factor, kept):
    x, params, wanted = served
    with mesh(AxisType.Auto):
        layer = functools.partial(
            moe_layer,
            router=to_one_expert,
            strategy=strategy,
            axes=FSDP,
            capacity_factor=factor,
            layout=layout,
        )
        y, stats = jax.jit(
            jax.shard_map(
                layer,
                in_specs=(FSDP.token_spec(), FSDP.param_specs(params)),
                out_specs=(FSDP.token_spec(), P()),
                check_vma=True,
            )
        )(x, params)
    kept = np.tile(kept, 2)
    assert error(y, np.where(kept[:, None], wanted, 0)) < 1e-5
    assert stats.dropped == (~kept).sum()


def test_ragged_all_to_all_is_xlas_own_on_a_gpu(mesh, monkeypatch):
    x, params, d = problem()
    valid = np.ones(TOKENS, bool)
    with mesh(AxisType.Auto):
        operands = put(x, params, d, valid, axes=FSDP)
        both = value_and_gradients(sharded(FSDP, params, strategy="ragged_all_to_all"))
        text = both.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        # Experts with weights and tokens there, sums back; then both ways for the gradient.
        assert text.count("@ragged_all_to_all") == 2 + 1 + 1 + 2

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax.version, "__version_info__", (0, 11, 2))
        with pytest.raises(NotImplementedError, match=f"XLA_FLAGS=--{FALLBACK}=true"):
            jax.make_jaxpr(sharded(FSDP, params, strategy="ragged_all_to_all"))(x, params, valid)
        monkeypatch.setenv("XLA_FLAGS", f"--{FALLBACK}=true")
        jax.make_jaxpr(sharded(FSDP, params, strategy="ragged_all_to_all"))(x, params, valid)
