"""``demo``: an FP8 two-layer SwiGLU MLP on whatever machine this is, against float32."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepgemm_jax import fp8_gemm_nt, per_token_cast_to_fp8, prepare_weight, swiglu_quantize

# Tokens, hidden and intermediate size: as in DeepSeek-V3's experts, and small enough for a laptop.
GPU_SIZES = 4096, 7168, 2048
CPU_SIZES = 128, 512, 256

# Two quantised layers come out at about 0.003; a wrong tile or scale at far more.
ERROR_LIMIT = 0.01


def swiglu(gate_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


@jax.jit
def mlp(x, gate_up, down):
    """The weights are quantised; the activations are on the way."""
    hidden = fp8_gemm_nt(per_token_cast_to_fp8(x), gate_up)
    return fp8_gemm_nt(swiglu_quantize(hidden), down)


@jax.jit
def plain_mlp(x, gate_up, down):
    hidden = jnp.matmul(x, gate_up.T, precision="highest")
    return jnp.matmul(swiglu(hidden), down.T, precision="highest")


def difference(x: jax.Array, y: jax.Array) -> float:
    """1 − 2 Σxy / Σ(x² + y²): zero for equal arrays, one for unrelated ones."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return float(1 - 2 * jnp.sum(x * y) / jnp.sum(x * x + y * y))


def mean_ms(f: Callable, *args, calls: int = 10) -> float:
    jax.block_until_ready(f(*args))
    start = time.perf_counter()
    jax.block_until_ready([f(*args) for _ in range(calls)])
    return (time.perf_counter() - start) / calls * 1e3


def run() -> int:
    tokens, hidden, intermediate = GPU_SIZES if jax.default_backend() == "gpu" else CPU_SIZES
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, hidden))
    gate_up = jax.random.normal(keys[1], (2 * intermediate, hidden)) / hidden**0.5
    down = jax.random.normal(keys[2], (hidden, intermediate)) / intermediate**0.5

    fp8 = x.astype(jnp.bfloat16), prepare_weight(gate_up), prepare_weight(down)
    bf16 = [array.astype(jnp.bfloat16) for array in (x, gate_up, down)]
    error = difference(mlp(*fp8), plain_mlp(x, gate_up, down))

    program = mlp.lower(*fp8).compile().as_text() or ""
    kernels = program.count('custom_call_target="deepgemm_jax_gemm"')
    path = f"CUDA kernel, {kernels} calls" if kernels else "reference in plain JAX, no CUDA kernel"
    print(f"device  {jax.devices()[0].device_kind}")
    print(f"model   SwiGLU MLP, {tokens} tokens, hidden {hidden}, intermediate {intermediate}")
    print(f"path    {path}")
    print(f"error   {error:.2e} against float32, at most {ERROR_LIMIT:.0e} wanted")
    fp8_ms, bf16_ms = mean_ms(mlp, *fp8), mean_ms(plain_mlp, *bf16)
    print(f"time    {fp8_ms:.3f} ms a call, by XLA in bfloat16 {bf16_ms:.3f} ms")
    return 0 if error <= ERROR_LIMIT else 1
