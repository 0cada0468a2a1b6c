"""The kernels of a gated activation on the host, against plain JAX."""

import ctypes

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_simulator import Divisor, SimulatedKernel, TileGrid, aligned, unwritten

from deepgemm_jax.quantize import per_token_cast_to_fp8
from deepgemm_jax.training.op import BACKWARD, FORWARD, swiglu_backward, swiglu_forward


class SwigluForwardParams(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("h", "weights", "y", "y_scale", "kept", "kept_scale")
    ]
    _fields_ += [(name, ctypes.c_int) for name in ("m", "k")]
    _fields_ += [("by_blocks", Divisor)]


class SwigluBackwardParams(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("h", "h_scale", "dy", "group_sizes", "weights"),
            *("dh", "dh_scale", "t_dh", "t_dh_scale", "t_y", "t_y_scale", "d_weights"),
        )
    ]
    _fields_ += [(name, ctypes.c_int) for name in ("m", "k", "groups", "t_rows")]
    _fields_ += [("tiles", TileGrid)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


def assert_close(data, scale, wanted):
    """But for what is between two numbers and may become either: exp is not the same."""
    np.testing.assert_allclose(scale, wanted.scale, rtol=1e-2)
    found, wanted = (
        np.nan_to_num(np.asarray(x).view(jnp.float8_e4m3fn).astype(np.float32), nan=1e9)
        for x in (data, wanted.data)
    )
    np.testing.assert_allclose(found, wanted, rtol=0.13, atol=2**-8)
    assert (found != wanted).mean() < 0.02


@pytest.mark.parametrize("weighted", [True, False])
def test_forward(folder, weighted):
    m, k = 77, 256
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.normal(size=(m, 2 * k)) * np.exp(rng.normal(size=(m, 1))), jnp.bfloat16)
    h = h.at[3, 5].set(jnp.nan)
    weights = jnp.asarray(rng.uniform(size=m), jnp.float32) if weighted else None
    y, y_scale = unwritten((m, k), np.uint8), unwritten((k // 128, m), np.float32)
    kept, kept_scale = unwritten((m, 2 * k), np.uint8), unwritten((2 * k // 128, m), np.float32)
    SimulatedKernel(folder, FORWARD, SwigluForwardParams, [])(
        h=aligned(np.asarray(h)),
        weights=aligned(np.asarray(weights)) if weighted else None,
        y=y,
        y_scale=y_scale,
        kept=kept,
        kept_scale=kept_scale,
        m=m,
        k=k,
        by_blocks=Divisor.of(k // 128),
    )
    wanted_y, wanted_kept = swiglu_forward(h, weights, "xla")
    assert_close(y, y_scale.T, wanted_y)
    assert_close(kept, kept_scale.T, wanted_kept)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sizes", [[130, 0, 40], [-3, 300, 7], [0, 0, 0], [1, 128, 1]])
def test_backward(folder, sizes, weighted):
    batch, m, k, groups = 2, 200, 256, 3
    t_rows = 128 * (m // 128 + groups)
    rng = np.random.default_rng(0)
    h = rng.normal(size=(batch, m, 2 * k)) * np.exp(rng.normal(size=(batch, m, 1)))
    h[0, 1, 5], h[1, 2, 3] = np.nan, 1e5
    dy = jnp.asarray(rng.normal(size=(batch, m, k)), jnp.bfloat16)
    weights = jnp.asarray(rng.uniform(size=(batch, m)), jnp.float32) if weighted else None
    sizes = np.array([sizes, sizes[::-1]], np.int32)
    quantised = [per_token_cast_to_fp8(jnp.asarray(x, jnp.bfloat16)) for x in h]
    byte = np.uint8
    found = {
        "dh": unwritten((batch, m, 2 * k), byte),
        "dh_scale": unwritten((batch, 2 * k // 128, m), np.float32),
        "t_dh": unwritten((batch, 2 * k, t_rows), byte),
        "t_dh_scale": unwritten((batch, t_rows // 128, 2 * k), np.float32),
        "t_y": unwritten((batch, k, t_rows), byte),
        "t_y_scale": unwritten((batch, t_rows // 128, k), np.float32),
        "d_weights": unwritten((batch, m, k // 128), np.float32),
    }
    SimulatedKernel(folder, BACKWARD, SwigluBackwardParams, [])(
        h=aligned(np.stack([np.asarray(x.data).view(byte) for x in quantised])),
        h_scale=aligned(np.stack([np.asarray(x.scale).T for x in quantised])),
        dy=aligned(np.asarray(dy)),
        group_sizes=sizes,
        weights=aligned(np.asarray(weights)) if weighted else None,
        **found,
        m=m,
        k=k,
        groups=groups,
        t_rows=t_rows,
        tiles=TileGrid.of(batch, t_rows // 128, k // 128),
    )
    for i, x in enumerate(quantised):
        row_weights = weights[i] if weighted else None
        rows, columns, y, d_weights = swiglu_backward(x, dy[i], sizes[i], row_weights, "xla")
        for name, wanted in (("dh", rows), ("t_dh", columns), ("t_y", y)):
            assert_close(found[name][i], found[f"{name}_scale"][i].T, wanted)
        grouped = np.minimum(np.clip(sizes[i], 0, m).cumsum()[-1], m)
        np.testing.assert_allclose(
            found["d_weights"][i].sum(-1)[:grouped], d_weights[:grouped], rtol=1e-4, atol=1e-4
        )
        assert not found["d_weights"][i][grouped:].any()
