"""The declaration of the transposition."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.device import ARCHS
from .._core.op import Kernel, Op, Params
from .config import Config

VECTOR = 16  # bytes that a thread of the kernel loads and stores at once


@dataclasses.dataclass(frozen=True)
class TransposeParams(Params):
    dtype: Any = jnp.bfloat16


def _attributes(params, operands, device):
    config = dataclasses.astuple(Config(params.dtype.itemsize))
    return {"config": np.array(config, np.int64), "arch": device.arch}


def _refuses(params, operands):
    if jax.dtypes.itemsize_bits(params.dtype) < 8:
        return f"{params.dtype}, which shares its bytes"
    *_, m, n = operands[0].shape
    multiple = VECTOR // params.dtype.itemsize
    if m % multiple or n % multiple:
        return f"{m} × {n} of {params.dtype}, only for multiples of {multiple}"
    return None


layout_transpose = Op(
    "layout_transpose",
    operands={"x": "dtype[m n]"},
    results={"y": "dtype[n m]"},
    reference=lambda params, x: [jnp.swapaxes(x, -1, -2)],
    kernel=Kernel(
        target="deepgemm_jax_transpose", archs=ARCHS, attributes=_attributes, refuses=_refuses
    ),
    derivative="its rule is layout_transpose's, the function",
    batched=True,
)
