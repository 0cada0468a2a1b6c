"""The declarations of the dense GEMMs, and of the kernel that they share with the grouped ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.device import ARCHS, Device, cuda_device
from .._core.op import Kernel, Op, Params
from . import reference
from .config import ELEMENTS, AnyConfig, Problem, choose
from .explain import tell

DEEPGEMM_ALIGNMENT = 128  # rows, that it wants groups to be filled up to a multiple of


@dataclasses.dataclass(frozen=True)
class GemmParams(Params):
    preferred_element_type: Any = jnp.bfloat16
    config: AnyConfig | None = None


@dataclasses.dataclass(frozen=True)
class Form:
    """What a GEMM computes, whatever its sizes: see ``csrc/gemm/config.h``."""

    scales: str = "blocks"
    groups: str = "dense"
    a_mn_major: bool = False
    b_mn_major: bool = False
    # Contiguous groups: rows are told by an id each, and not by each group's start and end.
    by_id: bool = False

    def problem(self, params: Any, operands: Sequence[Any]) -> Problem:
        """The problem of a call: A and its scale, B and its scale, what tells the groups, C."""
        a, b = operands[0], operands[1 if self.scales == "none" else 2]
        told = {"dense": 0, "contiguous": 2 - self.by_id, "masked": 1, "along_k": 2}[self.groups]
        others = operands[2 if self.scales == "none" else 4 :]
        m, k = a.shape[-2:][:: -1 if self.a_mn_major else 1]
        n = b.shape[-1 if self.b_mn_major else -2]
        batch = a.shape[0] if a.ndim == 3 else 1
        if self.groups == "contiguous":
            batch = b.shape[0]
            # Told by id, groups are likely to be filled up, by half of that in the mean.
            filled_up = self.by_id and m % DEEPGEMM_ALIGNMENT == 0
            m = -(-m // batch)
            if filled_up:
                m = max(m - DEEPGEMM_ALIGNMENT // 2, m // 2)
        elif self.groups == "masked":
            m = min(params.expected_m or m, m)
        elif self.groups == "along_k":
            batch = others[0].shape[0]
            k = -(-k // batch)
        return Problem(
            m=m,
            n=n,
            k=k,
            batch=batch,
            out_dtype=params.preferred_element_type,
            accumulate=len(others) > told,
            a_dtype=a.dtype,
            b_dtype=b.dtype,
            a_mn_major=self.a_mn_major,
            b_mn_major=self.b_mn_major,
            scales=self.scales,
            groups=self.groups,
        )

    def kernel(self) -> Kernel:
        def attributes(params, operands, device):
            problem = self.problem(params, operands)
            config = _config(params, problem, device)
            tell(problem, config, device)
            return {
                "source": config.source,
                "config": np.array(config.integers, np.int64),
                "arch": device.arch,
                "num_sms": np.int64(config.num_sms(device)),
                "by_id": self.by_id,
            }

        return Kernel(
            target="deepgemm_jax_gemm",
            archs=ARCHS,
            attributes=attributes,
            column_major={"blocks": ("a.scale",), "channels": ("a.scale", "b.scale")}.get(
                self.scales, ()
            ),
            aliases={"c": "d"},
            scratch=self._scratch,
            refuses=self._refuses,
        )

    def _scratch(self, operands: Sequence[Any]) -> Sequence[jax.core.ShapedArray]:
        """Where the kernel lists the runs of rows of one group."""
        if not self.by_id:
            return ()
        return (jax.core.ShapedArray((operands[0].shape[-2] + 1, 4), jnp.int32),)

    def _refuses(self, params: Any, operands: Sequence[Any]) -> str | None:
        a, b = operands[0], operands[1 if self.scales == "none" else 2]
        wanted = ELEMENTS[2:] if self.scales == "none" else ELEMENTS[:2]
        for x in a, b:
            if x.dtype not in wanted:
                return f"operands of {x.dtype}"
            if x.shape[-1] * x.dtype.itemsize % 16:
                return f"rows of {x.shape[-1]} {x.dtype}, which are not 16-byte aligned"
        if params.preferred_element_type not in (jnp.bfloat16, jnp.float32):
            return f"a result of {params.preferred_element_type}"
        return None


def _config(params: Any, problem: Problem, device: Device) -> AnyConfig:
    """The config of a call; ValueError if the one given does not fit."""
    config = getattr(params, "config", None)
    if config is None:
        return choose(problem, device)
    config.validate(problem, device)
    return config


def _divide_k(total, params, *operands):
    """Parts of the sum stay float32; C is added to their total once, and the cast is last."""
    operands, c = (operands[:-1], operands[-1]) if len(operands) % 2 else (operands, None)
    # A config that was given is one for D's dtype and C.
    parts = dataclasses.replace(params, preferred_element_type=jnp.float32, config=None)
    (d,) = total(parts, *operands)
    if c is not None:
        d += c.astype(jnp.float32)
    return [d.astype(params.preferred_element_type)]


def _gemm(name: str, a: dict, b: dict, form: Form, limits: dict, derivative: str) -> Op:
    def check(params, operands):
        if params.config is not None:
            try:
                _config(params, form.problem(params, operands), cuda_device())
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    return Op(
        name,
        operands={**a, **b, "c?": "preferred_element_type[m n]"},
        results={"d": "preferred_element_type[m n]"},
        limits=limits,
        check=check,
        reference=reference.of_form(form.scales, form.a_mn_major, form.b_mn_major),
        kernel=form.kernel(),
        derivative=derivative,
        batched=True,
        fold=("m", "n"),
        divide=_divide_k,
    )


NO_DERIVATIVE = (
    "in jax.custom_vjp, with gradients that are products quantised along the dim that they contract"
)
QUANTISED = f"its operands are quantised. Stop their gradient, or wrap the call {NO_DERIVATIVE}"
PLAIN = "use jax.numpy.matmul, or wrap the call in jax.custom_vjp with gradients that are its kin"


FP8 = "float8_e4m3fn|float8_e5m2"


def out_dtype(name: str, preferred_element_type: Any, default: Any = jnp.bfloat16) -> np.dtype:
    # jnp.dtype(None) is float64.
    dtype = jnp.dtype(default if preferred_element_type is None else preferred_element_type)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{name}: preferred_element_type is {dtype}, wanted bfloat16 or float32")
    return dtype


def _fp8(name: str, a_scale: str, b_scale: str, scales: str) -> Op:
    return _gemm(
        name,
        {"a.data": f"{FP8}[m k]", "a.scale": f"float32[{a_scale}]"},
        {"b.data": f"{FP8}[n k]", "b.scale": f"float32[{b_scale}]"},
        Form(scales),
        {"n": (16, 1), "k": (16, 16)},
        QUANTISED,
    )


def _bf16(name: str, a: str, b: str) -> Op:
    return _gemm(
        name,
        {"a": f"bfloat16[{a}]"},
        {"b": f"bfloat16[{b}]"},
        Form("none", a_mn_major=a == "k m", b_mn_major=b == "k n"),
        {},
        PLAIN,
    )


fp8_gemm_nt: Op = _fp8("fp8_gemm_nt", "m k/128", "n/128 k/128", "blocks")
fp8_gemm_nt_1d1d: Op = _fp8("fp8_gemm_1d1d", "m k/128", "n k/128", "channels")
fp8_gemm_nt_rows: Op = _fp8("fp8_gemm_nt", "m", "n", "rows")
bf16_gemm_nt = _bf16("bf16_gemm_nt", "m k", "n k")
bf16_gemm_nn = _bf16("bf16_gemm_nn", "m k", "k n")
bf16_gemm_tn = _bf16("bf16_gemm_tn", "k m", "k n")
bf16_gemm_tt = _bf16("bf16_gemm_tt", "k m", "n k")
