"""The kernel of a gated activation's gradient on the host, against plain JAX."""

import ctypes

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_simulator import SimulatedKernel, aligned, unwritten

from deepgemm_jax.quantize import per_token_cast_to_fp8
from deepgemm_jax.training.op import SOURCE, swiglu_backward_transpose

INPUTS = "h", "h_scale", "dy", "group_sizes", "weights"
RESULTS = "dh", "dh_scale", "t_dh", "t_dh_scale", "t_y", "t_y_scale", "d_weights"


class SwigluBackwardParams(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (*INPUTS, *RESULTS)]
    _fields_ += [(name, ctypes.c_int) for name in ("batch", "m", "k", "groups", "t_rows")]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return SimulatedKernel(tmp_path_factory.mktemp("training"), SOURCE, SwigluBackwardParams, [])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sizes", [[130, 0, 40], [-3, 300, 7], [0, 0, 0], [1, 128, 1]])
def test_against_plain_jax(kernel, sizes, weighted):
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
    kernel(
        h=aligned(np.stack([np.asarray(x.data).view(byte) for x in quantised])),
        h_scale=aligned(np.stack([np.asarray(x.scale).T for x in quantised])),
        dy=aligned(np.asarray(dy)),
        group_sizes=sizes,
        weights=aligned(np.asarray(weights)) if weighted else None,
        **found,
        batch=batch,
        m=m,
        k=k,
        groups=groups,
        t_rows=t_rows,
    )
    for i, x in enumerate(quantised):
        row_weights = weights[i] if weighted else None
        rows, columns, y, d_weights = swiglu_backward_transpose(
            x, dy[i], sizes[i], row_weights, "xla"
        )
        for name, wanted in (("dh", rows), ("t_dh", columns), ("t_y", y)):
            # What is between two numbers may become either: exp is not the same.
            scale = found[f"{name}_scale"][i].T
            np.testing.assert_allclose(scale, wanted.scale, rtol=1e-2)
            data, wanted_data = (
                np.nan_to_num(x.astype(np.float32), nan=1e9)
                for x in (found[name][i].view(jnp.float8_e4m3fn), np.asarray(wanted.data))
            )
            np.testing.assert_allclose(data, wanted_data, rtol=0.13, atol=2**-8)
            assert (data != wanted_data).mean() < 0.02
        grouped = np.minimum(np.clip(sizes[i], 0, m).cumsum()[-1], m)
        np.testing.assert_allclose(
            found["d_weights"][i].sum(-1)[:grouped], d_weights[:grouped], rtol=1e-4, atol=1e-4
        )
        assert not found["d_weights"][i][grouped:].any()
