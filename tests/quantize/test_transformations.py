"""The quantising ops under vmap, on meshes, lowered for a GPU and exported."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cast_oracles import random_input
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deepgemm_jax import fp8_gemm_nt, quantize
from deepgemm_jax.quantize import (
    op,
    per_block_cast_to_fp8,
    per_token_cast_to_fp8,
    prepare_weight,
    quantize_transpose,
    swiglu_quantize,
    swiglu_quantize_backward,
)

M, K = 256, 1024
SIZES = np.array([130, 0, 70], np.int32)
# What each op is given, and how it may be divided on a mesh of x: 2 and y: 4.
CALLS = {
    "per_token_cast_to_fp8": ([(M, K)], P("x", "y")),
    "per_channel_cast_to_fp8": ([(M, K)], P("x", "y")),
    "per_block_cast_to_fp8": ([(M, K)], P("x", "y")),
    "per_row_cast_to_fp8": ([(M, K)], P("x", "y")),
    "per_tensor_cast_to_fp8": ([(M, K)], P("x", "y")),
    "quantize_transpose": ([(M, K)], P("x", "y")),
    "activation_quantize": ([(M, K), (M,)], P("x", "y")),
    "activation_quantize_backward": ([(M, K), (M, K), (M,)], P("x")),
    "swiglu_quantize": ([(M, K), (M,)], P("y")),
    "swiglu_quantize_backward": ([(M, K), (M, K // 2), (M,)], P("y")),
}
# Scales that several devices' rows or columns share.
GLOBAL = ("per_row_cast_to_fp8", "per_tensor_cast_to_fp8")
each_op = pytest.mark.parametrize("name", CALLS)


def function(name):
    # Powers of two: no scale depends on how XLA orders what comes before it.
    return functools.partial(getattr(quantize, name), scale_format="ue8m0")


def operands(name, batch=()):
    shapes, _ = CALLS[name]
    return [
        jnp.asarray(random_input(i, (*batch, *shape), jnp.float32)).clip(-30, 30)
        for i, shape in enumerate(shapes)
    ]


def assert_equal(results, wanted):
    for result, want in zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True):
        assert (result.shape, result.dtype) == (want.shape, want.dtype)
        # A sum over columns may be taken in another order.
        tolerance = {jnp.float32.dtype: 1e-5}.get(result.dtype, 0)
        result, want = (np.asarray(x, np.float32) for x in (result, want))
        np.testing.assert_allclose(result, want, rtol=tolerance)


@each_op
def test_vmap(name):
    call = function(name)
    batch = operands(name, (3,))
    results = jax.jit(jax.vmap(call))(*batch)
    for i in range(3):
        wanted = jax.jit(call)(*(x[i] for x in batch))
        assert_equal(jax.tree.map(lambda x, i=i: x[i], results), wanted)


@pytest.mark.parametrize("name", ["per_block_cast_to_fp8", "quantize_transpose"])
def test_nested_vmap(name):
    call = function(name)
    (x,) = operands(name, (2, 3))
    results = jax.jit(jax.vmap(jax.vmap(call), 1, 1))(x)
    assert_equal(jax.tree.map(lambda y: y[1, 2], results), jax.jit(call)(x[1, 2]))


def test_vmap_of_groups_that_each_divides_its_own_way():
    x = operands("quantize_transpose", (2,))[0]
    sizes = np.stack([SIZES, SIZES[::-1]])
    call = function("quantize_transpose")
    results = jax.jit(jax.vmap(call))(x, sizes)
    for i in range(2):
        assert_equal(jax.tree.map(lambda y, i=i: y[i], results), jax.jit(call)(x[i], sizes[i]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@each_op
def test_mesh(mesh, monkeypatch, kind, name):
    spec = CALLS[name][1]
    given = operands(name)
    wanted = jax.jit(function(name))(*given)
    seen = set()
    declared = getattr(op, name)
    reference = declared.reference

    def record(params, x, *rest):
        seen.add(x.shape)
        return reference(params, x, *rest)

    monkeypatch.setattr(declared, "reference", record)
    with mesh(kind):
        # A function of its own, so that no other test's trace is taken from the cache.
        results = jax.jit(lambda *xs: function(name)(*xs))(
            *(jax.device_put(x, P(*spec[: x.ndim])) for x in given)
        )
    assert_equal(results, wanted)
    parts = {"x": 2, "y": 4}
    m, k = (n // parts.get(axis, 1) for n, axis in zip((M, K), (*spec, None), strict=False))
    assert seen == {(m, k)}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_groups_on_a_mesh(mesh, kind):
    (x,) = operands("quantize_transpose")
    call = function("quantize_transpose")
    wanted = jax.jit(call)(x, SIZES)
    with mesh(kind):
        results = jax.jit(lambda x, sizes: call(x, sizes))(
            *jax.device_put((x, SIZES), (P(None, "y"), P()))
        )
    assert_equal(results, wanted)


@each_op
def test_shard_map(mesh, name):
    spec = CALLS[name][1] if name not in GLOBAL else P("x")
    given = operands(name)
    if name == "per_tensor_cast_to_fp8":
        # A scale of each device's own.
        wanted = jax.vmap(function(name), out_axes=0)(given[0].reshape(2, M // 2, K))
        wanted = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), wanted)
    else:
        wanted = jax.jit(function(name))(*given)

    def transposed_spec(x):
        # The transposed form of what is divided along x and y is divided along y and x.
        return spec if x.shape[0] != K else P("y", "x")

    out_specs = jax.tree.map(lambda x: P(*transposed_spec(x)[: x.ndim]), wanted)
    in_specs = tuple(P(*spec[: x.ndim]) for x in given)
    with mesh(AxisType.Auto):
        sharded = jax.shard_map(function(name), in_specs=in_specs, out_specs=out_specs)
        assert_equal(jax.jit(sharded)(*given), wanted)


def lower(call, *operands, **keywords):
    traced = jax.jit(lambda *xs: call(*xs, **keywords)).trace(*operands)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@each_op
def test_lowers_for_a_gpu(name, caplog):
    call, given = function(name), operands(name)
    with caplog.at_level(logging.WARNING, "deepgemm_jax"):
        assert "custom_call" not in lower(call, *given, implementation="xla")
        text = lower(call, *given)
    assert "custom_call @deepgemm_jax_quantize" in text
    assert lower(call, *given, implementation="cuda") == text
    assert not caplog.records


@pytest.mark.parametrize(
    ("call", "shapes", "reason"),
    [
        (per_token_cast_to_fp8, [(4, 100)], "100 columns, only for multiples of 8"),
        (quantize_transpose, [(100, 128)], "100 rows, only for multiples of 16"),
        (swiglu_quantize, [(4, 264)], "132 columns, only for multiples of 8"),
        (swiglu_quantize_backward, [(4, 400), (4, 200)], "200 columns, only for multiples of 128"),
    ],
)
def test_calls_that_kernels_are_not_made_for(call, shapes, reason):
    given = [jnp.ones(shape, jnp.bfloat16) for shape in shapes]
    assert "custom_call" not in lower(call, *given)
    with pytest.raises(NotImplementedError, match=f"^{call.__name__} has no kernel for {reason}"):
        lower(call, *given, implementation="cuda")


def test_dtypes_that_kernels_are_not_made_for():
    half = jnp.ones((4, 256), jnp.float16)
    assert "custom_call" not in lower(per_block_cast_to_fp8, half)
    x, dy = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((4, 128))
    with pytest.raises(NotImplementedError, match="no kernel for dy of float32 with x of bfloat16"):
        lower(swiglu_quantize_backward, x, dy, implementation="cuda")
    with pytest.raises(NotImplementedError, match="no kernel for weights of bfloat16"):
        lower(swiglu_quantize, x, x[:, 0], implementation="cuda")


def test_the_gemm_takes_the_scales_as_the_cast_writes_them():
    x, w = jnp.ones((64, 512), jnp.bfloat16), jnp.ones((128, 512), jnp.bfloat16)
    text = lower(lambda x, w: fp8_gemm_nt(per_token_cast_to_fp8(x), prepare_weight(w)), x, w)
    written = re.search(r"@deepgemm_jax_quantize_rows.*result_layouts = \[(.*?)\]}", text)[1]
    read = re.search(r"@deepgemm_jax_gemm.*operand_layouts = \[(.*?)\],", text)[1]
    layouts = [re.findall(r"dense<\[(.*?)\]>", text) for text in (written, read)]
    assert layouts == [["1, 0", "0, 1"], ["1, 0", "0, 1", "1, 0", "1, 0"]]


@pytest.mark.parametrize("name", ["per_token_cast_to_fp8", "swiglu_quantize"])
def test_export_with_any_number_of_rows(name):
    given = operands(name)
    (m,) = export.symbolic_shape("m")
    types = [jax.ShapeDtypeStruct((m, *x.shape[1:]), x.dtype) for x in given]
    exported = export.export(jax.jit(function(name)), platforms=("cpu",))(*types)
    exported = export.deserialize(exported.serialize())
    assert_equal(exported.call(*given), jax.jit(function(name))(*given))
