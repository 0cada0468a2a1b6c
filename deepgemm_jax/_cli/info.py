"""``info``: what is here, what is missing, and how to get it."""

from __future__ import annotations

import platform
import shutil
import subprocess

import jax
import jaxlib

import deepgemm_jax

from .. import _C, runtime
from .._core.device import cuda_device

INSTALL_CUDA = "pip install 'jax[cuda13]', or 'jax[cuda12]' for a driver of CUDA 12"


def driver_name() -> str | None:
    """The NVIDIA driver's version ("580.65.06"), where nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() or None


def run() -> None:
    lines = {
        "deepgemm_jax": deepgemm_jax.__version__,
        "Python": platform.python_version(),
        "JAX": f"{jax.__version__}, jaxlib {jaxlib.__version__}",
        "GPU": _gpu(),
        "NVRTC": _nvrtc(),
        "cache": _cache(),
    }
    width = max(map(len, lines))
    for name, line in lines.items():
        print(f"{name:{width}}  {line}")


def _driver() -> str:
    cuda = _C.driver_version()
    if cuda is None:
        return "none (no libcuda.so.1): ops run as plain JAX"
    return f"{driver_name() or 'version unknown'}, CUDA {cuda // 1000}.{cuda % 1000 // 10}"


def _gpu() -> str:
    if jax.default_backend() != "gpu":
        if _C.driver_version() is None:
            return f"none, JAX runs on {jax.default_backend()}"
        return f"JAX sees none, though a driver is here: {INSTALL_CUDA}"
    names = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
    device = cuda_device()
    return f"{jax.local_device_count()} × {names}, {device.arch}, {device.num_sms} SMs"


def _nvrtc() -> str:
    libraries = runtime.find_nvrtc()
    if not libraries:
        return f"none, so no kernel can be compiled: {INSTALL_CUDA}"
    try:
        major, minor = _C.nvrtc_version()
    except RuntimeError as error:
        return f"{libraries[-1]} does not work: {error}"
    return f"{major}.{minor}, {libraries[-1]}"


def _cache() -> str:
    info = runtime.cache_info()
    return f"{info.directory}: {info.entries} kernels, {info.size_bytes / 1e6:.1f} MB"
