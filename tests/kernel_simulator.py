"""Kernels whose CTAs are independent, on the host: see tests/simulator."""

import ctypes
from pathlib import Path

import numpy as np
from simulator_build import build

PROGRAM = """
#include "simulator.h"
#include "{source}"

alignas(16) thread_local uint4 memory[1 << 14];  // what a CTA shares

extern "C" void run(const deepgemm::{family}::{params}* params) {{
  using deepgemm::{family}::config;
  sim::launch(config.ctas(*params), config.threads(), 1, [=] {{ kernel(*params); }});
}}
"""


class Divisor(ctypes.Structure):
    """As in csrc/device/types.h."""

    _fields_ = [("magic", ctypes.c_uint), ("shift", ctypes.c_int)]

    @classmethod
    def of(cls, divisor: int) -> "Divisor":
        shift = 31 + (divisor - 1).bit_length()
        return cls(2**shift // divisor + 1, shift)


class TileGrid(ctypes.Structure):
    """As in csrc/device/scheduler.cuh."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("batch", "rows", "columns")),
        *((name, Divisor) for name in ("by_rows", "by_columns")),
    ]

    @classmethod
    def of(cls, batch: int, rows: int, columns: int) -> "TileGrid":
        return cls(batch, rows, columns, Divisor.of(rows), Divisor.of(columns))


class SimulatedKernel:
    """One variant of a kernel; `params` is a ctypes.Structure like the kernel's own."""

    def __init__(self, folder: Path, source: str, params: type[ctypes.Structure], config):
        program = folder / f"{Path(source).stem}.cc"
        family = Path(source).parent.name
        program.write_text(PROGRAM.format(source=source, family=family, params=params.__name__))
        self._run = build(program, config, folder).run
        self._params = params

    def __call__(self, **params) -> None:
        """Arrays are passed by their address."""
        values = {
            name: x.ctypes.data if isinstance(x, np.ndarray) else x for name, x in params.items()
        }
        self._run(ctypes.byref(self._params(**values)))


def unwritten(shape, dtype) -> np.ndarray:
    """What no kernel would write by chance, at an address as an allocator of GPUs gives it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(size + 256, 0xA5, np.uint8)
    first = -raw.ctypes.data % 256
    return raw[first : first + size].view(dtype).reshape(shape)


def aligned(x: np.ndarray) -> np.ndarray:
    copy = unwritten(x.shape, x.dtype)
    copy[...] = x
    return copy
