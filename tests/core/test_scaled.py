import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import random_matrix

from deepgemm_jax import ScaledArray, scaled


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 1), (128, 1)])
@pytest.mark.parametrize("shape", [(256, 512), (130, 400), (1, 16)])
def test_dequantize(shape, block):
    rng = np.random.default_rng(0)
    data = rng.normal(size=shape).astype(jnp.float8_e4m3fn)
    entries = [-(-length // size) for length, size in zip(shape, block, strict=True)]
    scale = rng.lognormal(size=entries).astype(np.float32)
    wanted = np.empty(shape, np.float32)
    for i, j in np.ndindex(shape):
        wanted[i, j] = np.float32(data[i, j]) * scale[i // block[0], j // block[1]]
    np.testing.assert_array_equal(ScaledArray(data, scale).dequantize(), wanted)


def test_one_scale_for_all():
    data = np.ones((130, 400), jnp.float8_e4m3fn)
    x = ScaledArray(data, np.full((1, 1), 3, np.float32)).dequantize(jnp.bfloat16)
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, np.full((130, 400), 3))


def test_scale_of_another_shape():
    with pytest.raises(ValueError, match=r"scale has shape \(130, 3\).*wanted 400 or 4 or 1 along"):
        ScaledArray(jnp.ones((130, 400)), jnp.ones((130, 3))).dequantize()
    with pytest.raises(ValueError, match="wanted 11 or 1 along"):
        ScaledArray(jnp.ones((11, 128)), jnp.ones((3, 1))).dequantize()
    with pytest.raises(ValueError, match=r"scale has shape \(130,\).*wanted 2 dimensions"):
        ScaledArray(jnp.ones((130, 400)), jnp.ones(130)).dequantize()


def test_is_a_pytree():
    x = random_matrix(np.random.default_rng(0), 64, 256, 1, batch=(3,))
    assert x.shape == (3, 64, 256)
    assert x.dtype == jnp.float8_e4m3fn
    each = jax.jit(jax.vmap(lambda x: x.dequantize()))(x)
    np.testing.assert_array_equal(each, x.dequantize())
    structure = jax.tree.structure(x)
    assert repr(jax.tree.unflatten(structure, [None, "no array"]))
    shapes = jax.tree.map(lambda leaf: leaf.shape, x)
    assert (shapes.data, shapes.scale) == ((3, 64, 256), (3, 64, 2))


def test_examples_of_the_docstrings():
    assert doctest.testmod(scaled).failed == 0


@pytest.mark.parametrize(
    "index", [0, -1, slice(1, 3), (1, 0), (slice(None), 1), (..., slice(None))]
)
def test_slices_of_leading_dims(index):
    rng = np.random.default_rng(0)
    for block_rows in (1, 128):
        x = random_matrix(rng, 200, 300, block_rows, batch=(4, 2))
        x = jax.tree.map(jnp.asarray, x)
        part = x[index]
        assert part.recipe == x.recipe[-part.ndim :]
        np.testing.assert_array_equal(part.dequantize(), x.dequantize()[index])


@pytest.mark.parametrize(
    "index", [5, slice(3, 140), np.array([7, 7, 1]), (slice(None, None, 2), ...)]
)
def test_slices_of_rows_with_scales_of_their_own(index):
    x = random_matrix(np.random.default_rng(0), 200, 300, 1)
    x = jax.tree.map(jnp.asarray, x)
    np.testing.assert_array_equal(x[index].dequantize(), x.dequantize()[index])
    chosen = jax.jit(lambda x, i: x[i].dequantize())(x, 3)
    np.testing.assert_array_equal(chosen, x.dequantize()[3])


def test_slices_under_one_scale():
    data = jnp.arange(60.0).reshape(3, 4, 5).astype(jnp.float8_e4m3fn)
    x = ScaledArray(data, jnp.full((1, 4, 1), 0.5))
    array = np.array([2, 0])
    apart = (0, slice(None), array)
    for index in [1, slice(0, 2), (slice(1, 2), 3), (2, 1, 4), array, (..., 2), apart]:
        np.testing.assert_array_equal(x[index].dequantize(), x.dequantize()[index])


def test_rows_one_by_one():
    x = random_matrix(np.random.default_rng(0), 3, 300, 1)
    rows = [row.dequantize() for row in jax.tree.map(jnp.asarray, x)]
    np.testing.assert_array_equal(np.stack(rows), x.dequantize())
    assert len(x) == 3
    with pytest.raises(TypeError, match="has no dimensions"):
        len(ScaledArray(jnp.ones(()), jnp.ones(())))


def test_is_itself_and_no_other():
    x, y = (ScaledArray(jnp.ones((2, 3)), jnp.ones((2, 1))) for _ in range(2))
    assert x == x and x != y
    assert len({x, y, x}) == 2


@pytest.mark.parametrize(
    ("x", "brief"),
    [
        ((np.ones((2, 3)), None), r"\(float64\[2,3\], None\)"),
        ([np.ones((2, 3)), 1], r"\[float64\[2,3\], 1\]"),
        (ScaledArray(np.ones((2, 3)), None), r"ScaledArray\(float64\[2,3\], scale=None\)"),
        ((np.ones((2, 3)), "one"), "'one'"),
    ],
    ids=str,
)
def test_what_is_no_operand(x, brief):
    with pytest.raises(TypeError, match=f"^op: a is .*{brief}.*, wanted a ScaledArray or a tuple"):
        scaled.unpack("op", "a", x)


def test_indices_that_scales_cannot_follow():
    x = ScaledArray(jnp.ones((3, 5), jnp.float8_e4m3fn), jnp.ones((3, 1)))
    with pytest.raises(IndexError, match="no mask may choose"):
        x[:, np.array([True, False, True, True, False])]
    with pytest.raises(IndexError, match="has no new dims"):
        x[None]


def test_slices_that_would_part_a_block():
    x = random_matrix(np.random.default_rng(0), 200, 300, 128)
    for index in [3, slice(0, 128), (slice(None), 5)]:
        with pytest.raises(IndexError, match="scale for every 128 of (200|300) along axis [01]"):
            x[index]
    packed = ScaledArray(jnp.zeros((2, 100), jnp.float8_e4m3fn), jnp.zeros((2, 1), jnp.int32))
    with pytest.raises(IndexError, match="scale for every 128 of 100"):
        packed[0, 3]
    assert packed[0].shape == (100,)
    for index in [(0, 0, 0), (..., 0, ...), (np.array([0]), np.array([0]))]:
        with pytest.raises(IndexError, match="index is"):
            x[index]


@pytest.mark.parametrize("columns", [1, 128, 129, 512, 513, 2000])
def test_packed_scales(columns):
    exponents = np.random.default_rng(0).integers(-60, 60, (3, -(-columns // 128)))
    scale = np.ldexp(np.float32(1), exponents)
    data = np.random.default_rng(1).normal(size=(3, columns)).astype(jnp.float8_e4m3fn)
    packed = scaled.pack_ue8m0(scale)
    assert packed.shape == (3, -(-columns // 512))
    x = ScaledArray(data, packed)
    assert x.recipe == (1, 128)
    wanted = data.astype(np.float32) * np.repeat(scale, 128, 1)[:, :columns]
    np.testing.assert_array_equal(jax.jit(lambda x: x.dequantize())(x), wanted)
    with pytest.raises(ValueError, match="an int32 for every four blocks"):
        ScaledArray(data, np.zeros((3, columns // 512 + 2), np.int32)).dequantize()


def test_every_exponent_is_unpacked():
    packed = np.arange(256, dtype=np.uint8).view("<i4")
    scale = np.asarray(scaled.unpack_ue8m0(packed))
    np.testing.assert_array_equal(scale[1:255], np.ldexp(np.float32(1), np.arange(-126, 128)))
    assert scale.view(np.int32)[0] == 1 << 22  # 2⁻¹²⁷, which a CPU's arithmetic takes for zero
    assert np.isnan(scale[255])


def test_a_leaf_of_parameters_in_tree_maps():
    rng = np.random.default_rng(0)
    params = {"w": random_matrix(rng, 130, 256, 128), "b": np.ones(3, np.float32)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert isinstance(zeros["w"], ScaledArray)
    assert (zeros["w"].dequantize() == 0).all()
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    assert names == ["['b']", "['w'].data", "['w'].scale"]

    def is_scaled(x):
        return isinstance(x, ScaledArray)

    wide = jax.tree.map(lambda x: x.dequantize() if is_scaled(x) else x, params, is_leaf=is_scaled)
    step = jax.tree.map(lambda p, g: p - 0.1 * g, wide, jax.tree.map(jnp.ones_like, wide))
    np.testing.assert_allclose(step["w"], params["w"].dequantize() - 0.1, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_checkpoint_round_trip(tmp_path, packed):
    """By what checkpoints are made of: the leaves, under their paths."""
    w = random_matrix(np.random.default_rng(0), 130, 700, 128, batch=(2,))
    if packed:
        w = ScaledArray(w.data, scaled.pack_ue8m0(np.exp2(np.round(w.scale))))
    state = {"layer": [jax.tree.map(jnp.asarray, w)], "step": jnp.int32(7)}
    leaves, structure = jax.tree.flatten(state)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    # NumPy's format has no float8.
    np.savez(
        tmp_path / "state.npz",
        **{
            name: np.asarray(leaf).view(np.uint8) if leaf.dtype.itemsize == 1 else leaf
            for name, leaf in zip(names, leaves, strict=True)
        },
    )
    stored = np.load(tmp_path / "state.npz")
    restored = jax.tree.unflatten(
        structure,
        [stored[name].view(leaf.dtype) for name, leaf in zip(names, leaves, strict=True)],
    )
    assert isinstance(restored["layer"][0], ScaledArray)
    assert restored["layer"][0].recipe == w.recipe
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    abstract = jax.eval_shape(lambda state: state, state)
    assert repr(abstract["layer"][0]) == repr(w)


@pytest.mark.parametrize("packed", [False, True])
def test_orbax_round_trip(tmp_path, packed):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    w = random_matrix(np.random.default_rng(0), 130, 700, 128, batch=(2,))
    if packed:
        w = ScaledArray(w.data, scaled.pack_ue8m0(np.exp2(np.round(w.scale))))
    state = {"layer": [jax.tree.map(jnp.asarray, w)], "step": jnp.int32(7)}
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    assert isinstance(restored["layer"][0], ScaledArray)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(
    ("data", "scale"),
    [((3, 256), (3, 2)), ((2, 256, 384), (2, 2, 3)), ((256, 5), (2, 5)), ((4, 6), (1, 1))],
)
def test_qwix_round_trip(data, scale):
    qwix = pytest.importorskip("qwix")
    rng = np.random.default_rng(0)
    x = ScaledArray(
        jnp.asarray(rng.normal(size=data), jnp.float8_e4m3fn),
        jnp.asarray(rng.lognormal(size=scale), jnp.float32),
    )
    q = x.to_qwix()
    np.testing.assert_array_equal(qwix.dequantize(q), x.dequantize())
    back = ScaledArray.from_qwix(q)
    assert back.recipe == x.recipe
    jax.tree.map(np.testing.assert_array_equal, back, x)


def test_what_qwix_quantised_and_what_it_cannot_hold():
    qwix = pytest.importorskip("qwix")
    x = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    fp8 = jnp.float8_e4m3fn
    q = qwix.quantize(x, fp8, channelwise_axes=[0], tiled_axes={1: 128})
    np.testing.assert_array_equal(ScaledArray.from_qwix(q).dequantize(), qwix.dequantize(q))
    for columns, tile in ((256, 64), (130, 65)):
        q = qwix.quantize(x[:, :columns], fp8, channelwise_axes=[0], tiled_axes={1: tile})
        with pytest.raises(ValueError, match="^ScaledArray: .*scale"):
            ScaledArray.from_qwix(q)
    with pytest.raises(ValueError, match="partial block"):
        ScaledArray(jnp.ones((4, 200), fp8), jnp.ones((4, 2))).to_qwix()
    packed = ScaledArray(jnp.ones((4, 256), fp8), scaled.pack_ue8m0(jnp.full((4, 2), 0.5)))
    np.testing.assert_array_equal(qwix.dequantize(packed.to_qwix()), packed.dequantize())
