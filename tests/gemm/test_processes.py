"""fp8_gemm_nt in processes of its own: what they share, and what one finds that another left."""

import pytest
from processes import finish, free_address, start

CACHED = """
import jax
from deepgemm_jax import fp8_gemm_nt
from oracles import random_problem

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append("cache_hits" in event))
jax.jit(fp8_gemm_nt)(*random_problem(0, 64, 128, 256))
print(sum(hits))
"""


def test_second_process_finds_the_executable_in_jax_cache(tmp_path):
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    assert finish(start(CACHED, **environment)) == "0"
    assert finish(start(CACHED, **environment)) == "1"


DIVIDED = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from deepgemm_jax import fp8_gemm_nt
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracles import assert_close, Oracle, product, random_problem

address, process, kind = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
a, b = random_problem(0, 64, 512, 1024)
mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType[kind],) * 2)
with jax.set_mesh(mesh):
    # K over the axis whose devices are in two processes.
    d = jax.jit(lambda a, b: fp8_gemm_nt(a, b, preferred_element_type=jnp.float32))(
        *jax.device_put((a, b), (P("y", "x"), P(None, "x")))
    )
oracle = product(a, b)
for shard in d.addressable_shards:
    assert_close(shard.data, Oracle(oracle.value[shard.index], oracle.magnitude[shard.index]))
print("close")
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_mesh_of_two_processes(kind):
    address = free_address()
    flags = "--xla_force_host_platform_device_count=4"
    processes = [start(DIVIDED, address, i, kind, XLA_FLAGS=flags) for i in range(2)]
    assert [finish(process) for process in processes] == ["close", "close"]
