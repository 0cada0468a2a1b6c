"""What all tests share: eight CPU devices, and CUDA's where there are any."""

import os

# Read once, when JAX starts its CPU backend.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# NVRTC has a cache too where there is a driver. From there nothing is said of registers and spills.
os.environ["CUDA_CACHE_DISABLE"] = "1"

import jax
import pytest
from jax.sharding import AxisType


def cuda_devices() -> int:
    try:
        return len(jax.local_devices(backend="cuda"))
    except RuntimeError:
        return 0


def pytest_configure():
    if not cuda_devices():
        # Half of the tests' time goes into compiling many small programs for CPUs.
        jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items):
    found = cuda_devices()
    for item in items:
        for marker, needed in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(marker) and found < needed:
                reason = f"needs {needed} CUDA device(s), found {found}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """What is not marked to need a GPU runs on a CPU, module fixtures too."""
    on_gpu = any(item.get_closest_marker(marker) for marker in ("gpu", "multigpu"))
    with jax.default_device(None if on_gpu else jax.local_devices(backend="cpu")[0]):
        return (yield)


@pytest.fixture
def mesh():
    """Makes the mesh x: 2, y: 4 of CPU devices, its axes of the given types, the current one."""

    def mesh(*types: AxisType):
        types = types * 2 if len(types) == 1 else types
        return jax.set_mesh(
            jax.make_mesh((2, 4), ("x", "y"), axis_types=types, devices=jax.devices("cpu"))
        )

    return mesh
