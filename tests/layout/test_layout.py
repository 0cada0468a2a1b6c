"""The layouts of scales against NumPy, and what compiled programs make of them."""

import doctest
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deepgemm_jax import layout, quantize
from deepgemm_jax.layout import (
    get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mk_alignment_for_contiguous_layout,
    get_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mn_major_tma_aligned_tensor,
    get_tma_aligned_size,
    layout_transpose,
    transform_sf_into_required_layout,
)
from deepgemm_jax.scaled import unpack_ue8m0


def scales(*shape) -> np.ndarray:
    exponents = np.random.default_rng(0).integers(-126, 128, shape)
    return np.ldexp(np.float32(1), exponents)


def pack(sf) -> np.ndarray:
    """Four exponents to an int32 along the last dim."""
    exponents = (sf.view(np.uint32) >> 23).astype(np.uint8)
    filled = np.zeros((*sf.shape[:-1], -(-sf.shape[-1] // 4) * 4), np.uint8)
    filled[..., : sf.shape[-1]] = exponents
    return filled.view("<i4")


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_tma_aligned_size(size):
    for x in range(40):
        aligned = get_tma_aligned_size(x, size)
        assert aligned >= x and aligned * size % 16 == 0 and (aligned - x) * size < 16


def test_alignment_of_groups():
    assert get_mk_alignment_for_contiguous_layout() == 128


@pytest.mark.parametrize("shape", [(130, 7), (3, 130, 7), (1, 1), (0, 4)])
def test_values_stay(shape):
    sf = scales(*shape)
    for function in (get_mn_major_tma_aligned_tensor, jax.jit(get_mn_major_tma_aligned_tensor)):
        np.testing.assert_array_equal(function(sf), sf)
    # What a program returns is read by the next one, too.
    returned = jax.jit(get_mn_major_tma_aligned_tensor)(jnp.asarray(sf))
    np.testing.assert_array_equal(returned + 0, sf)
    packed = jax.jit(get_mn_major_tma_aligned_packed_ue8m0_tensor)(sf)
    assert packed.dtype == jnp.int32
    np.testing.assert_array_equal(packed, pack(sf))


@pytest.mark.parametrize(
    "function", [get_mn_major_tma_aligned_tensor, get_mn_major_tma_aligned_packed_ue8m0_tensor]
)
def test_vmap(function):
    sf = scales(3, 130, 7)
    np.testing.assert_array_equal(jax.jit(jax.vmap(function))(sf), function(sf))


def test_every_exponent_is_packed():
    exponents = np.arange(256, dtype=np.uint32)
    sf = (exponents << 23).view(np.float32).reshape(64, 4)
    packed = np.asarray(get_mn_major_tma_aligned_packed_ue8m0_tensor(sf))
    np.testing.assert_array_equal(packed.view(np.uint8).reshape(-1), exponents)
    unpacked = unpack_ue8m0(packed)  # of which the first is a denormal
    again = get_mn_major_tma_aligned_packed_ue8m0_tensor(unpacked)
    np.testing.assert_array_equal(again, packed)


def test_what_is_no_power_of_two_becomes_nan():
    sf = np.array([[1.0, 3.0, -2.0, np.nan, np.inf, np.nextafter(1, 2, dtype=np.float32)]])
    packed = np.asarray(get_mn_major_tma_aligned_packed_ue8m0_tensor(sf.astype(np.float32)))
    assert packed.view(np.uint8)[0, :6].tolist() == [127, 255, 255, 255, 255, 255]


def test_the_producer_writes_the_layout():
    """It is a fusion's result as it is: no copy or transposition makes it."""

    @jax.jit
    def program(x):
        cast = quantize.per_token_cast_to_fp8(x)
        return cast.data, get_mn_major_tma_aligned_tensor(cast.scale)

    text = program.lower(jnp.ones((256, 1024), jnp.bfloat16)).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    assert re.search(r"= (f32\[256,8\].*?)\(", entry)[1] == "f32[256,8]{0,1} fusion"
    assert not re.search(r" (copy|transpose)\(", entry)


@pytest.mark.parametrize("groups", [None, 3])
def test_required_layout(groups):
    outer = () if groups is None else (groups,)
    m, n, k = 130, 260, 700
    rows, blocks = scales(*outer, m, 6), scales(*outer, 3, 6)
    expanded = np.repeat(blocks, 128, axis=-2)[..., :n, :]
    for arch, wanted_rows, wanted_blocks in [
        ("sm_90a", rows, blocks),
        ("sm_100a", pack(rows), pack(expanded)),
    ]:
        transform = functools.partial(
            transform_sf_into_required_layout, k=k, num_groups=groups, arch=arch
        )
        np.testing.assert_array_equal(transform(rows, m, recipe=(1, 128)), wanted_rows)
        np.testing.assert_array_equal(transform(blocks, n, recipe=(128, 128)), wanted_blocks)
    np.testing.assert_array_equal(transform(pack(rows), m, recipe=(1, 128)), pack(rows))
    np.testing.assert_array_equal(transform(pack(blocks), n, recipe=(128, 128)), pack(expanded))


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(-3, 1500), min_size=3, max_size=3))
@example(sizes=[0, 0, 0])
@example(sizes=[512, 512, 256])
@example(sizes=[1, 1, 1])
def test_scales_in_groups(sizes):
    blocks = [-(-max(size, 0) // 128) for size in sizes]
    rows = 40
    sf = scales(rows, 5)
    packed = np.asarray(k_grouped(sf, np.array(sizes, np.int32)))
    wanted = np.zeros((rows // 4 + 3, 5), np.int32)
    at = start = 0
    for count in blocks:
        part = pack(np.ascontiguousarray(sf[start : start + count].T)).T
        wanted[at : at + len(part)] = part
        at, start = at + len(part), start + count
    np.testing.assert_array_equal(packed, wanted)


def test_scales_of_no_rows():
    assert not k_grouped(scales(0, 5), np.array([3, 0], np.int32)).any()


k_grouped = jax.jit(get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(130, 7), (3, 33, 65), (0, 5)])
def test_transpose(dtype, shape):
    x = np.random.default_rng(0).integers(-9, 9, shape).astype(dtype)
    y = jax.jit(layout_transpose)(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(np.asarray(y), np.swapaxes(x, -1, -2))


def test_transpose_is_a_kernel_on_a_gpu():
    def lower(x, **keywords):
        traced = jax.jit(functools.partial(layout_transpose, **keywords)).trace(x)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    for dtype, unit in ((jnp.int8, 16), (jnp.bfloat16, 8), (jnp.float32, 4)):
        x = jnp.zeros((2, unit, 3 * unit), dtype)
        assert "custom_call @deepgemm_jax_transpose" in lower(x)
        assert "custom_call" not in lower(x, implementation="xla")
        assert "custom_call" not in lower(x[..., 1:])
        with pytest.raises(NotImplementedError, match=f"only for multiples of {unit}"):
            lower(x[..., 1:], implementation="cuda")
    with pytest.raises(NotImplementedError, match="no kernel for int4"):
        lower(jnp.zeros((16, 16), jnp.int4), implementation="cuda")


def test_transpose_has_derivatives():
    x = jnp.arange(12.0).reshape(3, 4)
    gradient = jax.grad(lambda x: (layout_transpose(x) ** 3).sum())(x)
    np.testing.assert_allclose(gradient, 3 * x**2)
    _, tangent = jax.jvp(layout_transpose, (x,), (x,))
    np.testing.assert_array_equal(tangent, x.T)


def test_on_a_mesh(mesh):
    sf = scales(64, 8)
    with mesh(AxisType.Auto):
        for function, wanted in [
            (get_mn_major_tma_aligned_tensor, sf),
            (get_mn_major_tma_aligned_packed_ue8m0_tensor, pack(sf)),
        ]:
            sharded = jax.shard_map(function, in_specs=P("x"), out_specs=P("x"))
            np.testing.assert_array_equal(jax.jit(sharded)(sf), wanted)
        transposed = jax.shard_map(layout_transpose, in_specs=P("x"), out_specs=P(None, "x"))
        np.testing.assert_array_equal(jax.jit(transposed)(sf), sf.T)


SF = jnp.ones((130, 8))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: get_tma_aligned_size(5, 3), ValueError, "element_size is 3"),
        (lambda: get_tma_aligned_size(-1, 4), ValueError, "x is -1"),
        (lambda: get_mn_major_tma_aligned_tensor(SF.astype(int)[0]), ValueError, r"\(8,\)"),
        (lambda: get_mn_major_tma_aligned_tensor(SF.astype(jnp.int8)), TypeError, "int8"),
        (
            lambda: get_mn_major_tma_aligned_packed_ue8m0_tensor(SF.astype(int)),
            TypeError,
            "int32, wanted float32",
        ),
        (lambda: layout_transpose(SF[0]), ValueError, r"\(8,\)"),
        (lambda: layout_transpose(SF.astype(jnp.complex64)), TypeError, "complex64"),
        (
            lambda: transform_sf_into_required_layout(SF, 130, 1000, (1, 128), arch="sm_80"),
            ValueError,
            "arch is 'sm_80'",
        ),
        (
            lambda: transform_sf_into_required_layout(SF, 130, 1000, (1, 1)),
            ValueError,
            r"recipe is \(1, 1\)",
        ),
        (
            lambda: transform_sf_into_required_layout(SF, 130, 1100, (1, 128)),
            ValueError,
            r"\(130, 8\), wanted \(130, 9\)",
        ),
        (
            lambda: transform_sf_into_required_layout(
                SF.astype(int), 130, 4096, (1, 128), arch="sm_90a"
            ),
            TypeError,
            "int32, wanted float32 for sm_90a",
        ),
        (lambda: k_grouped(SF, jnp.ones(3)), TypeError, "group_sizes has dtype float32"),
        (lambda: k_grouped(SF, jnp.ones((1, 3), int)), ValueError, r"group_sizes has shape \(1, 3"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=rf"^\w+: .*{words}"):
        call()


def test_examples_of_the_docstrings():
    assert doctest.testmod(layout).failed == 0
