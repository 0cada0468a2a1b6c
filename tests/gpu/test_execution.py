"""What only a GPU shows of fp8_gemm_nt: how XLA runs its kernel. Its values are tested in
tests/gemm, on a GPU too."""

import ctypes
import functools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import assert_close, product, put, random_like, random_problem

from deepgemm_jax import ScaledArray, fp8_gemm_nt
from deepgemm_jax._core.device import cuda_device
from deepgemm_jax.gemm.config import FewRows, Problem, candidates, choose

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("m", [1, 300])
def test_every_config_gives_the_product(m, dtype, add):
    n, k = 520, 656
    a, b = random_problem(0, m, n, k)
    c = random_like(0, m, n, k, dtype) if add else None
    oracle = product(a, b, c)
    operands = put((a, b, c), "cuda")
    problem = Problem(m=m, n=n, k=k, batch=1, out_dtype=dtype, accumulate=add)
    for config, _ in candidates(problem, cuda_device()):
        d = fp8_gemm_nt(*operands, preferred_element_type=dtype, config=config)
        assert_close(d, oracle, "cuda")


def test_clusters_that_divide_k_go_from_tile_to_tile():
    m, n, k = 17, 9000, 400  # more tiles than clusters
    a, b = random_problem(5, m, n, k)
    operands = put((a, b), "cuda")
    problem = Problem(m=m, n=n, k=k, batch=1, out_dtype=jnp.bfloat16, accumulate=False)
    for config, _ in candidates(problem, cuda_device()):
        if isinstance(config, FewRows):
            gemm = jax.jit(functools.partial(fp8_gemm_nt, config=config))
            first, second = gemm(*operands), gemm(*operands)
            assert_close(first, product(a, b), "cuda")
            assert (first == second).all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (129, 264, 144), (64, 7168, 2048)])
def test_every_element_is_written(m, n, k):
    a, b = random_problem(1, m, n, k)
    operands = put((a, b), "cuda")
    gemm = jax.jit(fp8_gemm_nt).lower(*operands).compile()
    for poison in (np.nan, 1e30):
        # XLA gives out last what it got back last.
        jax.block_until_ready([put(jnp.full((m, n), poison, jnp.bfloat16), "cuda")] * 3)
        assert_close(gemm(*operands), product(a, b), "cuda")


def test_donated_c_becomes_d():
    a, b = random_problem(2, 256, 512, 512)
    c = random_like(2, 256, 512, 512, jnp.float32)
    oracle = product(a, b, c)
    a, b, c = put((a, b, c), "cuda")
    gemm = functools.partial(fp8_gemm_nt, preferred_element_type=jnp.float32)
    address = c.unsafe_buffer_pointer()
    d = jax.jit(gemm, donate_argnums=2)(a, b, c)
    assert c.is_deleted()
    assert d.unsafe_buffer_pointer() == address
    assert_close(d, oracle, "cuda")


CHAIN = """
import jax
import numpy as np
from deepgemm_jax import ScaledArray, fp8_gemm_nt
from oracles import random_problem


@jax.jit
def chain(x, w, scale):
    for _ in range(8):
        x = ScaledArray(fp8_gemm_nt(x, w).astype(x.dtype), scale)
    return x.data


x, w = jax.device_put(random_problem(0, 256, 256, 256))
scale = x.scale / 16
first = np.asarray(chain(x, w, scale)).tobytes()
for _ in range(3):
    assert np.asarray(chain(x, w, scale)).tobytes() == first
"""


def test_chain_is_captured_in_a_command_buffer(tmp_path):
    path = os.pathsep.join([str(TESTS), *sys.path])
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_module_re=jit_chain.*"
    subprocess.run(
        [sys.executable, "-c", CHAIN],
        env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": flags},
        check=True,
    )

    def thunks(dump):
        """The kinds of those that are not inside a command buffer, where lines are indented."""
        (file,) = tmp_path.glob(f"*jit_chain*.{dump}.txt")
        return re.findall(r"^\d+: (k\w+)", file.read_text(), flags=re.MULTILINE)

    assert thunks("thunk_sequence").count("kCustomCall") == 8
    after = thunks("thunk_sequence_after_thunk_passes")
    assert "kCommandBuffer" in after
    assert "kCustomCall" not in after


def test_two_executables_in_two_threads():
    problems = [random_problem(seed, 128 + seed, 512, 1024) for seed in range(2)]
    operands = put(problems, "cuda")
    start = threading.Barrier(2)
    results = [[], []]

    def run(i):
        start.wait()
        # Each thread compiles too: both kernels are the same one.
        gemm = jax.jit(lambda a, b: fp8_gemm_nt(a, b, preferred_element_type=jnp.float32))
        results[i] = [gemm(*operands[i]) for _ in range(100)]
        jax.block_until_ready(results[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for problem, (first, *rest) in zip(problems, results, strict=True):
        assert_close(first, product(*problem), "cuda")
        assert len(rest) == 99
        assert all((each == first).all() for each in rest)


def test_memory_is_as_before_after_a_thousand_calls():
    operands = put(random_problem(3, 128, 512, 512), "cuda")
    gemm = jax.jit(fp8_gemm_nt)

    def used():
        (device,) = gemm(*operands).block_until_ready().devices()
        # The driver's memory too: what kernels and graphs take is not in JAX's count.
        return device.memory_stats()["bytes_in_use"], free_bytes()

    def unchanged():
        before = used()
        for _ in range(1000):
            gemm(*operands).block_until_ready()
        return used() == before

    for _ in range(10):
        used()
    # Other programs on the GPU may take memory meanwhile, but hardly each time.
    assert any(unchanged() for _ in range(5))


def free_bytes() -> int:
    """What the driver has left of the first GPU."""
    driver = ctypes.CDLL("libcuda.so.1")
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert driver.cuCtxPushCurrent_v2(context) == 0
    assert driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    assert driver.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    assert driver.cuDevicePrimaryCtxRelease_v2(0) == 0
    return free.value


@pytest.fixture
def raw_call():
    """Calls the FFI target on a small problem, with attributes that Python would not choose."""
    a, b = put(random_problem(4, 64, 128, 128), "cuda")
    device = cuda_device()
    problem = Problem(m=64, n=128, k=128, batch=1, out_dtype=jnp.bfloat16, accumulate=False)
    config = choose(problem, device)
    attributes = {
        "source": config.source,
        "config": np.array(config.integers, np.int64),
        "arch": device.arch,
        "num_sms": np.int64(config.num_sms(device)),
        "by_id": False,
    }

    def raw_call(**changed):
        call = jax.ffi.ffi_call(
            "deepgemm_jax_gemm",
            jax.ShapeDtypeStruct((64, 128), jnp.bfloat16),
            input_layouts=[(0, 1), (1, 0), (0, 1), (0, 1)],
        )
        arguments = a.data, a.scale, b.data, b.scale
        return jax.jit(lambda *x: call(*x, **attributes | changed))(*arguments)

    return raw_call


def test_errors_at_compile_time_say_what_is_wrong(raw_call):
    assert raw_call().shape == (64, 128)
    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)config"):
        raw_call(config=np.array([1, 2], np.int64))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="(?s)NVRTC could not compile.*for sm_1 .*whole log is in"
    ):
        raw_call(arch="sm_1")


def test_scales_that_xla_computes_arrive_column_major():
    a, b = random_problem(5, 300, 256, 640)

    @jax.jit
    def scaled_in_jax(a, b):
        return fp8_gemm_nt(ScaledArray(a.data, jnp.exp2(jnp.round(jnp.log2(a.scale)))), b)

    a.scale[:] = np.maximum(a.scale, 1e-3)
    rounded = ScaledArray(a.data, np.exp2(np.round(np.log2(a.scale))))
    assert_close(scaled_in_jax(*put((a, b), "cuda")), product(rounded, b), "cuda")


@pytest.mark.multigpu
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("a_spec", "b_spec"),
    [(P("x"), P()), (P(), P("x")), (P(None, "x"), P(None, "x"))],
)
def test_mesh_of_two_gpus(kind, a_spec, b_spec):
    a, b = random_problem(6, 256, 1024, 1024)
    devices = jax.local_devices(backend="cuda")[:2]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=devices)
    with jax.set_mesh(mesh):
        operands = [
            jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((a, a_spec), (b, b_spec))
        ]
        gemm = jax.jit(
            functools.partial(
                fp8_gemm_nt, preferred_element_type=jnp.float32, implementation="cuda"
            )
        )
        assert_close(gemm(*operands), product(a, b), "cuda")
