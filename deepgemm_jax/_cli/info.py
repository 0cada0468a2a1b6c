"""``info``: what is here, what is missing, and how to get it."""

from __future__ import annotations

import platform
import shutil
import subprocess

import jax
import jaxlib

import deepgemm_jax

from .. import _C, runtime
from .._core.device import ARCHS, cuda_device
from . import cache

INSTALL_CUDA = "pip install 'jax[cuda13]', or 'jax[cuda12]' for a driver of CUDA 12"


def cuda_version() -> str | None:
    """The CUDA version that the driver supports ("13.0")."""
    version = _C.driver_version()
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def driver_version() -> str | None:
    """The NVIDIA driver's own version ("580.65.06"), where nvidia-smi tells it."""
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
        "driver": _driver(),
        "GPU": _gpu(),
        "NVRTC": _nvrtc(),
        "cache": cache.describe(),
    }
    width = max(map(len, lines))
    for name, line in lines.items():
        print(f"{name:{width}}  {line}")


def _driver() -> str:
    cuda = cuda_version()
    return f"{driver_version() or '?'}, CUDA {cuda}" if cuda else "none"


def _gpu() -> str:
    backend = jax.default_backend()
    if backend != "gpu":
        if _C.driver_version() is None:
            return f"none: ops run as plain JAX on {backend}"
        return f"JAX sees none, though a driver is here: {INSTALL_CUDA}"
    device = cuda_device()
    line = f"{jax.local_device_count()} × {jax.devices()[0].device_kind}, {device.arch}"
    if device.arch not in ARCHS:
        return f"{line}: no kernels for it, ops run as plain JAX"
    return f"{line}, {device.num_sms} SMs"


def _nvrtc() -> str:
    libraries = runtime.find_nvrtc()
    if not libraries:
        return f"none, so no kernel can be compiled: {INSTALL_CUDA}"
    try:
        major, minor = _C.nvrtc_version()
    except RuntimeError as error:
        return f"{libraries[-1]} does not work: {error}"
    return f"{major}.{minor}, {libraries[-1]}"
