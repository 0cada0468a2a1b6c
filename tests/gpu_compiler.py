"""What XLA makes of programs for H200s, on a machine that need not have one.

XLA then asks the package's handlers for their kernels, as it does before it runs a program.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# Of XLA's proto of this name; figures as the driver tells them.
TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 62914560
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
}
"""


@functools.cache
def h200s(count: int = 1) -> list[Any]:
    """Devices of one host, to compile for."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET, topology=f"1x1x{count}"
    )
    return topology.devices


def found() -> bool:
    try:
        return bool(h200s())
    except (NotImplementedError, RuntimeError):
        return False


needs_compiler = pytest.mark.skipif(
    not found(), reason="needs jax-cuda13-plugin and, without a GPU, JAX_PLATFORMS=cpu"
)


def compiled(function: Callable, *operands: Any, **options: Any) -> jax.stages.Compiled:
    """The function of such arrays, jitted with these options, for one H200."""
    sharding = SingleDeviceSharding(h200s()[0])
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), operands
    )
    return jax.jit(function, **options).lower(*operands).compile()


def kernels(program: jax.stages.Compiled) -> list[str]:
    """The package's kernels that the program calls."""
    return re.findall(r'custom_call_target="deepgemm_jax_(\w+)"', program.as_text())
