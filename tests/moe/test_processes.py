"""The layer over processes that meet through `jax.distributed`."""

from pathlib import Path

import pytest
from processes import finish, free_address, start

LAYER = Path(__file__).with_name("layer_process.py").read_text()


@pytest.mark.parametrize(
    ("processes", "strategy", "recipe"), [(2, "all_to_all", "fp8"), (4, "all_gather", "bf16")]
)
def test_result_and_gradients(processes, strategy, recipe):
    address = free_address()
    # What takes longest is compiling, in each process.
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    started = [
        start(LAYER, address, i, processes, strategy, recipe, XLA_FLAGS=flags)
        for i in range(processes)
    ]
    assert [finish(process) for process in started] == ["close"] * processes
