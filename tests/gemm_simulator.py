"""The GEMM's kernels on the host: see tests/simulator."""

import ctypes
import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from gemm_forms import SMS, Form
from simulator_build import build

from deepgemm_jax._core.device import H200
from deepgemm_jax.gemm.config import AnyConfig, FewRows


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in ("batch", "rows", "columns")),
    ]

    @classmethod
    def of(cls, x: np.ndarray) -> "Matrix":
        return cls(x.ctypes.data, x.shape[0] if x.ndim == 3 else 1, *x.shape[-2:])


class Operands(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in "abd"),
        ("a_scale", ctypes.c_void_p),
        ("b_scale", ctypes.c_void_p),
        ("groups", ctypes.c_void_p * 2),
        ("spans", ctypes.c_void_p),
    ]


def simulate(
    form: Form, config: AnyConfig, folder: Path, c: np.ndarray | None = None
) -> np.ndarray:
    """What the kernel makes of the form's operands."""
    operands = Operands()
    kept = []  # until the kernel has run

    def laid_out(array, x) -> np.ndarray:
        if array.name in form.op.kernel.column_major:
            x = np.swapaxes(x, -1, -2)
        kept.append(np.ascontiguousarray(x))
        return kept[-1]

    groups = []
    for array, operand in zip(form.op.signature.operands, form.operands, strict=False):
        x = laid_out(array, operand)
        name = array.name.removesuffix(".data").replace(".", "_")
        if name in ("a", "b"):
            setattr(operands, name, Matrix.of(x))
        elif name.endswith("_scale"):
            setattr(operands, name, x.ctypes.data)
        else:
            groups.append(x.ctypes.data)
    operands.groups = (*groups, None, None)[:2]
    dtype = jnp.float32 if config.out_float32 else jnp.bfloat16
    # A little more than D, which nothing must be written to.
    size, margin = form.expected.size, 64
    memory = np.full(size + 2 * margin, np.nan if c is None else 7, dtype)
    d = memory[margin:-margin].reshape(form.expected.shape)
    if c is not None:
        d[:] = c
    operands.d = Matrix.of(d)
    if form.form.by_id:
        kept.append(np.zeros((form.expected.shape[-2] + 1, 4), np.int32))
        operands.spans = kept[-1].ctypes.data
    edges = memory[:margin].tobytes(), memory[-margin:].tobytes()
    source = "few_rows.cc" if isinstance(config, FewRows) else "gemm.cc"
    num_sms = config.num_sms(dataclasses.replace(H200, num_sms=SMS))
    build(source, config.integers, folder).run(ctypes.byref(operands), num_sms)
    assert edges == (memory[:margin].tobytes(), memory[-margin:].tobytes())
    return d
