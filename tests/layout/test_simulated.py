"""The transposing kernel on the host."""

import ctypes

import numpy as np
import pytest
from kernel_simulator import SimulatedKernel, TileGrid, aligned, unwritten

from deepgemm_jax.layout import config


class Params(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y")]
    _fields_ += [(name, ctypes.c_int) for name in ("m", "n")]
    _fields_ += [("tiles", TileGrid)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_transpose(tmp_path, dtype):
    itemsize = np.dtype(dtype).itemsize
    kernel = SimulatedKernel(tmp_path, config.SOURCE, Params, [itemsize])
    rng = np.random.default_rng(0)
    unit = 16 // itemsize
    for batch, m, n in ((2, 17 * unit, 33 * unit), (1, unit, unit)):
        x = aligned(rng.integers(0, 2**32, (batch, m, n)).astype(dtype))
        y = unwritten((batch, n, m), dtype)
        tiles = (-(-size // (16 * unit)) for size in (m, n))
        kernel(x=x, y=y, m=m, n=n, tiles=TileGrid.of(batch, *tiles))
        np.testing.assert_array_equal(y, np.swapaxes(x, 1, 2))
