"""The quantising kernels on the host, against plain JAX."""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cast_oracles import FP8, assert_close, assert_same, random_input
from kernel_simulator import Divisor, SimulatedKernel, TileGrid, aligned, unwritten
from simulator_build import build

from deepgemm_jax import ScaledArray
from deepgemm_jax.quantize import (
    activation_quantize,
    activation_quantize_backward,
    config,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_row_cast_to_fp8,
    per_token_cast_to_fp8,
    quantize_transpose,
    swiglu_quantize,
    swiglu_quantize_backward,
)

POINTER, INT = ctypes.c_void_p, ctypes.c_int


class RowsParams(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("x", "dy", "weights", "data", "scale", "d_weights")]
    _fields_ += [(name, INT) for name in ("m", "k", "round_up")]
    _fields_ += [("by_blocks", Divisor)]


class TilesParams(ctypes.Structure):
    _fields_ = [
        (name, POINTER) for name in ("x", "group_sizes", "data", "scale", "t_data", "t_scale")
    ]
    _fields_ += [(name, INT) for name in ("m", "k", "groups", "t_rows", "round_up")]
    _fields_ += [("tiles", TileGrid)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")

    @functools.cache
    def kernel(*chosen):
        integers = vars(config.rows(*chosen)).values()
        run = SimulatedKernel(folder, config.ROWS, RowsParams, integers)
        return lambda k, **params: run(k=k, by_blocks=Divisor.of(blocks(k)), **params)

    return kernel


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")

    @functools.cache
    def kernel(*chosen):
        integers = vars(config.tiles(*chosen)).values()
        run = SimulatedKernel(folder, config.TILES, TilesParams, integers)
        return lambda batch, t_rows, k, **params: run(
            t_rows=t_rows, k=k, tiles=TileGrid.of(batch, blocks(t_rows), blocks(k)), **params
        )

    return kernel


def blocks(length):
    return -(-length // 128)


def column_major(shape):
    """A scale in memory, and as an array."""
    memory = unwritten((shape[1], shape[0]), np.float32)
    return memory, memory.T


FORMS = [(jnp.bfloat16, FP8[0], "float32"), (jnp.float32, FP8[1], "ue8m0")]


def spoilt(shape, dtype):
    x = random_input(0, shape, dtype)
    x[1, 5], x[0, -1] = np.nan, np.inf
    return aligned(x)


@pytest.mark.parametrize(("x_dtype", "dtype", "scale_format"), FORMS)
def test_rows(rows, x_dtype, dtype, scale_format):
    kernel = rows("cast", "silu", x_dtype, dtype)
    for m, k in ((37, 392), (8, 8), (130, 128)):
        x, data = spoilt((m, k), x_dtype), unwritten((m, k), dtype)
        memory, scale = column_major((m, blocks(k)))
        kernel(x=x, data=data, scale=memory, m=m, k=k, round_up=scale_format != "float32")
        wanted = per_token_cast_to_fp8(x, dtype=dtype, scale_format=scale_format)
        assert_same(ScaledArray(data, scale), wanted.data, wanted.scale)


def test_rows_of_every_bfloat16(rows):
    x = np.zeros((2**16 // 64, 128), jnp.bfloat16)
    x[:, ::2] = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16).reshape(-1, 64)
    x[:, 1] = 448
    data, (memory, scale) = unwritten(x.shape, FP8[0]), column_major((len(x), 1))
    kernel = rows("cast", "silu", jnp.bfloat16, FP8[0])
    kernel(x=aligned(x), data=data, scale=memory, m=len(x), k=128, round_up=0)
    wanted = per_token_cast_to_fp8(x)
    assert_same(ScaledArray(data, scale), wanted.data, wanted.scale)


@pytest.mark.parametrize(("x_dtype", "dtype"), [form[:2] for form in FORMS])
def test_rows_with_scales_that_are_given(rows, x_dtype, dtype):
    m, k = 37, 392
    x, data = spoilt((m, k), x_dtype), unwritten((m, k), dtype)
    scale = np.random.default_rng(1).lognormal(size=(m, 1)).astype(np.float32)
    rows("scaled", "silu", x_dtype, dtype)(x=x, data=data, scale=aligned(scale), m=m, k=k)
    wanted = per_row_cast_to_fp8(x, scale, dtype=dtype)
    assert_same(ScaledArray(data, scale), wanted.data, wanted.scale)


@pytest.mark.parametrize(("x_dtype", "dtype", "scale_format"), FORMS)
def test_whole_rows(rows, x_dtype, dtype, scale_format):
    kernel = rows("whole_rows", "silu", x_dtype, dtype)
    for m, k in ((11, 392), (3, 2048), (5, 4000), (2, 8192), (3, config.WHOLE_ROW)):
        x, data = random_input(0, (m, k), x_dtype), unwritten((m, k), dtype)
        x[1, 5], x[0, -1] = np.nan, 100
        scale = unwritten((m, 1), np.float32)
        kernel(x=aligned(x), data=data, scale=scale, m=m, k=k, round_up=scale_format != "float32")
        wanted = per_row_cast_to_fp8(x, dtype=dtype, scale_format=scale_format)
        assert_same(ScaledArray(data, scale), wanted.data, wanted.scale)


ACTIVATIONS = [("silu", jnp.bfloat16), ("gelu", jnp.float32), ("gelu_tanh", jnp.bfloat16)]


@pytest.mark.parametrize("parts", [2, 1])
@pytest.mark.parametrize(("activation", "x_dtype"), ACTIVATIONS)
def test_activations(rows, activation, x_dtype, parts):
    m, k = 21, 392
    rng = np.random.default_rng(0)
    x = aligned((rng.normal(size=(m, parts * k)) * 3).astype(x_dtype))
    weights = rng.random(m).astype(np.float32)
    data, (memory, scale) = unwritten((m, k), FP8[0]), column_major((m, blocks(k)))
    function, op = [("activated", activation_quantize), ("gated", swiglu_quantize)][parts - 1]
    kernel = rows(function, activation, x_dtype, FP8[0])
    for given in ((weights,), ()):
        kernel(
            x=x, weights=given[0] if given else None, data=data, scale=memory, m=m, k=k, round_up=0
        )
        assert_close(ScaledArray(data, scale), op(x, *given, activation=activation))


BACKWARD = [
    ("activated_backward", activation_quantize_backward, 136),
    ("gated_backward", swiglu_quantize_backward, 256),
]


@pytest.mark.parametrize("parts", [2, 1])
@pytest.mark.parametrize(("activation", "x_dtype"), ACTIVATIONS)
def test_their_gradients(rows, activation, x_dtype, parts):
    m, (function, op, k) = 13, BACKWARD[parts - 1]
    rng = np.random.default_rng(0)
    x = aligned((rng.normal(size=(m, parts * k)) * 3).astype(x_dtype))
    dy = aligned(rng.normal(size=(m, k)).astype(x_dtype))
    weights = rng.random(m).astype(np.float32)
    data, (memory, scale) = unwritten(x.shape, FP8[0]), column_major((m, parts * blocks(k)))
    d_weights = unwritten((m, blocks(k)), np.float32)
    kernel = rows(function, activation, x_dtype, FP8[0])
    kernel(
        x=x, dy=dy, weights=weights, data=data, scale=memory, d_weights=d_weights, m=m, k=k,
        round_up=0,
    )  # fmt: skip
    wanted, wanted_weights = op(x, dy, weights, activation=activation)
    assert_close(ScaledArray(data, scale), wanted)
    np.testing.assert_allclose(d_weights.sum(axis=1), wanted_weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("x_dtype", "dtype", "scale_format"), FORMS)
@pytest.mark.parametrize("tiling", ["per_channel", "per_block"])
def test_tiles(tiles, tiling, x_dtype, dtype, scale_format):
    kernel = tiles(tiling, x_dtype, dtype)
    cast = per_channel_cast_to_fp8 if tiling == "per_channel" else per_block_cast_to_fp8
    for batch, m, k in ((2, 131, 392), (1, 2, 8)):
        x = aligned(np.stack([spoilt((m, k), x_dtype)] * batch))
        x[0, 0, 0] = 999
        columns = k if tiling == "per_channel" else blocks(k)
        data = unwritten(x.shape, dtype)
        scale = unwritten((batch, blocks(m), columns), np.float32)
        kernel(
            x=x, data=data, scale=scale, batch=batch, m=m, k=k, t_rows=m,
            round_up=scale_format != "float32",
        )  # fmt: skip
        for i in range(batch):
            wanted = cast(x[i], dtype=dtype, scale_format=scale_format)
            assert_same(ScaledArray(data[i], scale[i]), wanted.data, wanted.scale)


@pytest.mark.parametrize(("x_dtype", "dtype", "scale_format"), FORMS)
def test_blocks_both_ways(tiles, x_dtype, dtype, scale_format):
    kernel = tiles("per_block_both_ways", x_dtype, dtype)
    for m, k in ((272, 136), (16, 8)):
        x = aligned(np.stack([spoilt((m, k), x_dtype)] * 2))
        x[0, 0, 0] = 999
        data, t_data = unwritten(x.shape, dtype), unwritten((2, k, m), dtype)
        scale = unwritten((2, blocks(m), blocks(k)), np.float32)
        t_scale = unwritten((2, blocks(k), blocks(m)), np.float32)
        kernel(
            x=x, data=data, scale=scale, t_data=t_data, t_scale=t_scale, batch=2, m=m, k=k,
            t_rows=m, round_up=scale_format != "float32",
        )  # fmt: skip
        for i in range(2):
            wanted = per_block_cast_to_fp8(x[i], dtype=dtype, scale_format=scale_format)
            assert_same(ScaledArray(data[i], scale[i]), wanted.data, wanted.scale)
            assert_same(ScaledArray(t_data[i].T, t_scale[i].T), wanted.data, wanted.scale)


@pytest.mark.parametrize(("x_dtype", "dtype", "scale_format"), FORMS)
def test_both_ways(tiles, x_dtype, dtype, scale_format):
    kernel = tiles("both_ways", x_dtype, dtype)
    for m, k in ((272, 136), (16, 8)):
        x = spoilt((m, k), x_dtype)
        results = run_both_ways(kernel, x, dtype, m, round_up=scale_format != "float32")
        for result, wanted in zip(
            results, quantize_transpose(x, dtype=dtype, scale_format=scale_format), strict=True
        ):
            assert_same(result, wanted.data, wanted.scale)


def run_both_ways(kernel, x, dtype, t_rows, **more):
    m, k = x.shape
    data, (memory, scale) = unwritten((m, k), dtype), column_major((m, blocks(k)))
    t_data = unwritten((k, t_rows), dtype)
    t_memory, t_scale = column_major((k, blocks(t_rows)))
    kernel(
        x=x, data=data, scale=memory, t_data=t_data, t_scale=t_memory,
        batch=1, m=m, k=k, t_rows=t_rows, **more,
    )  # fmt: skip
    return ScaledArray(data, scale), ScaledArray(t_data, t_scale)


def test_groups(tiles):
    kernel = tiles("both_ways", jnp.bfloat16, FP8[0])
    m, k = 300, 72
    x = aligned(random_input(1, (m, k)))
    quantize = jax.jit(quantize_transpose)
    for sizes in (
        [0, 0, 0, 0],
        [128, 128, 44, 0],
        [1, 1, 1, 297],
        [2**31 - 1, 2**31 - 1, -(2**31), 5],
        [100, 0, -3, 77],
        [3] * 20 + [0] * 15 + [130],
    ):
        sizes = np.array(sizes, np.int32)
        columns = 128 * (m // 128 + len(sizes))
        results = run_both_ways(
            kernel, x, FP8[0], columns, group_sizes=sizes, groups=len(sizes), round_up=0
        )
        *wanted, _ = quantize(x, sizes)
        for result, want in zip(results, wanted, strict=True):
            assert_same(result, want.data, want.scale)


def test_sums_of_sizes_do_not_overflow(tmp_path):
    """However many rows there are, and however many more the sizes add up to."""
    run = build("groups.cc", [], tmp_path).run
    run.argtypes = POINTER, INT, INT, INT, POINTER
    m = 2**31 - 1000
    sizes = np.full(40, 2**31 - 1, np.int32)
    found = np.zeros(3, np.int32)
    for t0, rows in [(0, 128), (m // 128 * 128, m % 128), (2**31 - 128, 0)]:
        run(sizes.ctypes.data, len(sizes), m, t0, found.ctypes.data)
        assert list(found) == [t0 if rows else 0, rows, m]
