"""The declaration of the dense GEMMs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.device import ARCHS, Device, cuda_device
from .._core.op import Kernel, Op, Params
from . import reference
from .config import Config, Problem, choose


@dataclasses.dataclass(frozen=True)
class GemmParams(Params):
    preferred_element_type: Any = jnp.bfloat16
    config: Config | None = None


def config_of(params: GemmParams, operands: Sequence[Any], device: Device) -> Config:
    """The config of a call, from its operands' types; ValueError if the one given does not fit."""
    a, _, b, _, *c = operands
    problem = Problem(
        m=a.shape[-2],
        n=b.shape[-2],
        k=a.shape[-1],
        batch=a.shape[0] if a.ndim == 3 else 1,
        out_dtype=params.preferred_element_type,
        accumulate=bool(c),
    )
    if params.config is None:
        return choose(problem, device)
    params.config.validate(problem, device)
    return params.config


def _check(params, operands):
    if params.config is not None:
        config_of(params, operands, cuda_device())


def _attributes(params, operands, device):
    config = config_of(params, operands, device)
    return {
        "config": np.array(dataclasses.astuple(config), np.int64),
        "arch": device.arch,
        "num_sms": np.int64(device.num_sms),
    }


def _divide_k(total, params, a, a_scale, b, b_scale, c=None):
    """Parts of the sum stay float32; C is added to their total once, and the cast is last."""
    # A config that was given is one for D's dtype and C.
    parts = dataclasses.replace(params, preferred_element_type=jnp.float32, config=None)
    (d,) = total(parts, a, a_scale, b, b_scale)
    if c is not None:
        d += c.astype(jnp.float32)
    return [d.astype(params.preferred_element_type)]


fp8_gemm_nt = Op(
    "fp8_gemm_nt",
    operands={
        "a.data": "float8_e4m3fn[m k]",
        "a.scale": "float32[m k/128]",
        "b.data": "float8_e4m3fn[n k]",
        "b.scale": "float32[n/128 k/128]",
        "c?": "preferred_element_type[m n]",
    },
    results={"d": "preferred_element_type[m n]"},
    limits={"n": (16, 1), "k": (16, 16)},
    check=_check,
    reference=reference.fp8_gemm_nt,
    kernel=Kernel(
        target="deepgemm_jax_gemm",
        archs=ARCHS,
        attributes=_attributes,
        column_major=("a.scale",),
        aliases={"c": "d"},
    ),
    derivative="its operands are quantised. Stop their gradient, or wrap the call in "
    "jax.custom_vjp, with gradients that are products quantised along the dim that they contract",
    batched=True,
    fold=("m", "n"),
    divide=_divide_k,
)
