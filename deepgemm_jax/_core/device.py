"""The device that a kernel is lowered for."""

import dataclasses
import functools

import jax

from .. import _C

ARCHS = ("sm_90a",)  # for which there are kernels


@dataclasses.dataclass(frozen=True)
class Device:
    """What the choice of a kernel needs to know of a GPU."""

    arch: str  # as NVRTC names it, with the suffix of the arch's own instructions: "sm_90a"
    num_sms: int
    smem_bytes: int  # shared memory that one block may ask for
    memory_gbs: float  # of device memory, as its clock and its width have it


H200 = Device(arch="sm_90a", num_sms=132, smem_bytes=232448, memory_gbs=4917)


@functools.cache
def cuda_device() -> Device:
    """The CUDA device of this process, or an H200 where there is none to lower for.

    All GPUs of a process are taken to be alike.
    """
    try:
        gpu = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return H200
    major, minor = gpu.compute_capability.split(".")
    suffix = "a" if int(major) >= 9 else ""
    return Device(
        arch=f"sm_{major}{minor}{suffix}",
        num_sms=gpu.core_count,
        smem_bytes=gpu.shared_memory_per_block_optin,
        memory_gbs=_C.memory_gbs(gpu.local_hardware_id) or H200.memory_gbs,
    )
