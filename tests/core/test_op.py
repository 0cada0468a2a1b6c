"""What an Op makes of a declaration, on ops made up for it."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepgemm_jax._core.op import Kernel, Op, Params

KERNEL = Kernel(
    target="made_up",
    archs=("sm_90a",),
    attributes=lambda *_: {},
    column_major=("scale",),
    refuses=lambda params, operands: "odd lengths" if operands[0].shape[-1] % 2 else None,
)


@dataclasses.dataclass(frozen=True)
class QuantizeParams(Params):
    to: jnp.dtype = jnp.dtype(jnp.int8)


def quantize_reference(params, x):
    m, k = x.shape
    blocks = jnp.pad(x, [(0, 0), (0, -k % 128)]).reshape(m, -1, 128)
    scale = jnp.abs(blocks).max(2) / 127
    data = jnp.round(blocks / scale[..., None]).reshape(m, -1)[:, :k]
    return [data.astype(params.to), scale]


# Two results, one of them of a static parameter's dtype; no batch dim: vmap makes more rows.
quantize = Op(
    "quantize",
    operands={"x": "float32[m k]"},
    results={"data": "to[m k]", "scale": "float32[m k/128]"},
    limits={},
    reference=quantize_reference,
    kernel=KERNEL,
    derivative="use another",
    fold=("m",),
)

# A factor that may not be divided, and one that only the operands have and that neither may.
select = Op(
    "select",
    operands={"x": "float32[g m k]", "weights": "float32[g]"},
    results={"y": "float32[m]"},
    limits={"k": (2, 2)},
    reference=lambda params, x, weights: [jnp.einsum("gmk,g->m", x, weights)],
    kernel=KERNEL,
    derivative="use another",
    whole=("g",),
)


@dataclasses.dataclass(frozen=True)
class FirstParams(Params):
    count: int = 3


# A result with a dim that no operand has.
first = Op(
    "first",
    operands={"x": "float32[m n]"},
    results={"y": "float32[m count]"},
    reference=lambda params, x: [x[..., : params.count]],
    derivative="use another",
    fold=("m",),
)


def test_results_and_their_dtypes():
    x = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    for to in (jnp.int8, jnp.int16):
        data, scale = jax.jit(lambda x, to=to: quantize(x, params=QuantizeParams(to=to)))(x)
        assert (data.dtype, data.shape) == (to, (5, 300))
        assert (scale.dtype, scale.shape) == (jnp.float32, (5, 3))
        value = data * np.repeat(scale, 128, 1)[:, :300]
        np.testing.assert_allclose(value, x, atol=np.max(scale) / 2)


def test_without_jit():
    x = np.ones((5, 300), np.float32)
    params = QuantizeParams(to=jnp.int8)
    with jax.disable_jit():
        data, _ = quantize(x, params=params)
    np.testing.assert_array_equal(data, quantize(x, params=params)[0])


def test_vmap_folds_rows_under_any_nesting():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 256)).astype(np.float32)

    def both(x):
        return quantize(x, params=QuantizeParams())

    for batched in (jax.vmap(jax.vmap(both)), jax.vmap(jax.vmap(both), 1, 1)):
        for result, wanted in zip(batched(x), both(x.reshape(30, 256)), strict=True):
            np.testing.assert_array_equal(result.reshape(wanted.shape), wanted)


def test_vmap_that_no_rule_covers():
    with pytest.raises(NotImplementedError, match="select: no vmap"):
        jax.vmap(lambda x: select(x, np.ones(2, np.float32), params=Params()))(
            np.ones((3, 2, 4, 6), np.float32)
        )


def test_checks_come_from_the_notation():
    x, weights = np.ones((2, 4, 6), np.float32), np.ones(2, np.float32)
    with pytest.raises(ValueError, match=r"select: weights has shape \(3,\), wanted \(2,\)"):
        select(x, np.ones(3, np.float32), params=Params())
    with pytest.raises(ValueError, match="select: x has k = 5, wanted .* a multiple of 2"):
        select(x[..., :5], weights, params=Params())
    with pytest.raises(TypeError, match="select: weights has dtype int32, wanted float32"):
        select(x, np.ones(2, np.int32), params=Params())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("spec", "piece"),
    [
        (("x", None), (32, 1024)),
        ((None, "y"), (64, 256)),
        (("y", "x"), (16, 512)),
        ((None, ("x", "y")), (64, 128)),
    ],
)
def test_results_are_divided_alike(mesh, monkeypatch, kind, spec, piece):
    seen = set()

    def reference(params, x):
        seen.add(x.shape)
        return quantize_reference(params, x)

    monkeypatch.setattr(quantize, "reference", reference)
    x = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    with mesh(kind):
        sharding = NamedSharding(jax.sharding.get_mesh(), P(*spec))
        results = jax.jit(lambda x: quantize(x, params=QuantizeParams()))(
            jax.device_put(x, sharding)
        )
    assert seen == {piece}
    for result, wanted in zip(results, quantize_reference(QuantizeParams(), x), strict=True):
        assert result.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("x", None, None), (None, None, "y"), ("y", "x", None)])
def test_what_may_not_be_divided_is_whole(mesh, monkeypatch, kind, spec):
    seen = set()

    def reference(params, x, weights):
        seen.add(x.shape)
        return [jnp.einsum("gmk,g->m", x, weights)]

    monkeypatch.setattr(select, "reference", reference)
    x = np.random.default_rng(0).normal(size=(4, 8, 12)).astype(np.float32)
    weights = np.arange(4, dtype=np.float32)
    with mesh(kind):
        m = jax.sharding.get_mesh()
        y = jax.jit(lambda x, weights: select(x, weights, params=Params()))(
            jax.device_put(x, NamedSharding(m, P(*spec))),
            jax.device_put(weights, NamedSharding(m, P(spec[0]))),
        )
    assert seen == {(4, 4 if spec[1] else 8, 12)}
    np.testing.assert_allclose(y, np.einsum("gmk,g->m", x, weights), rtol=1e-5, atol=1e-5)


def test_length_that_is_a_static_parameter():
    x = np.arange(48, dtype=np.float32).reshape(2, 4, 6)
    for count in (0, 2, 5):
        y = jax.vmap(lambda x, c=count: first(x, params=FirstParams(count=c)))(x)
        np.testing.assert_array_equal(y, x[..., :count])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("x", None), (None, "y"), ("y", "x")])
def test_length_that_is_a_static_parameter_is_whole(mesh, kind, spec):
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    with mesh(kind):
        m = jax.sharding.get_mesh()
        # XLA is asked to divide what it may not.
        out = NamedSharding(m, P(spec[0], "y" if spec[0] == "x" else None))
        y = jax.jit(
            lambda x: first(x, params=FirstParams(count=4)),
            out_shardings=out if kind == AxisType.Auto else None,
        )(jax.device_put(x, NamedSharding(m, P(*spec))))
    np.testing.assert_array_equal(y, x[:, :4])


def lower_for_gpu(k: int, **params) -> str:
    traced = jax.jit(lambda x: quantize(x, params=QuantizeParams(**params))).trace(jnp.ones((5, k)))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_kernel_gives_a_result_in_the_layout_declared():
    _, layouts = lower_for_gpu(300).split("result_layouts = ")
    assert re.findall(r"dense<\[(.*?)\]>", layouts) == ["1, 0", "0, 1"]


def test_kernel_that_refuses_a_call_leaves_it_to_the_reference(caplog):
    with caplog.at_level(logging.WARNING, "deepgemm_jax"):
        assert "made_up" in lower_for_gpu(300)
        assert "made_up" not in lower_for_gpu(301, implementation="xla")
        assert not caplog.records
        assert "made_up" not in lower_for_gpu(301)
        assert "made_up" not in lower_for_gpu(303)
    assert [record.message for record in caplog.records] == [
        "quantize has no kernel for odd lengths: plain JAX takes its place"
    ]
    with pytest.raises(NotImplementedError, match="quantize has no kernel for odd lengths"):
        lower_for_gpu(301, implementation="cuda")
