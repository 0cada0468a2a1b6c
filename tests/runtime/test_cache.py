"""The disk cache and its warm-up, with kernels really compiled."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import deepgemm_jax
from deepgemm_jax import _C, runtime
from deepgemm_jax._core.device import Device, cuda_device
from deepgemm_jax.attention import config as attention
from deepgemm_jax.gemm import config as gemm
from deepgemm_jax.layout import config as layout
from deepgemm_jax.quantize import config as quantize
from deepgemm_jax.training import op as training

DEVICE = cuda_device()
SHAPES = [(1, 576, 7168), (128, 7168, 2048), (4096, 4096, 4096)]

pytestmark = pytest.mark.skipif(not runtime.find_nvrtc(), reason="no NVRTC to compile with")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of this test's own, also for the extension."""
    folder = tmp_path / "cache"
    libraries = [str(library) for library in runtime.find_nvrtc()]
    monkeypatch.setattr(runtime, "cache_dir", lambda: folder)
    _C.configure(str(folder), libraries)
    yield folder
    monkeypatch.undo()
    _C.configure(str(runtime.cache_dir()), libraries)


def run_python(*arguments: object, **variables: str) -> None:
    """A process of its own, which finds the package under test wherever it was found here."""
    package = Path(deepgemm_jax.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(package)} | variables
    subprocess.run([sys.executable, *arguments], env=environment, check=True)


def first_call(m: int, n: int, k: int) -> None:
    """What the first call at this shape does before it can launch."""
    problem = gemm.Problem(m, n, k, batch=1, out_dtype=jnp.bfloat16, accumulate=False)
    config = gemm.choose(problem, DEVICE)
    _C.compile(config.source, config.integers, DEVICE.arch)


def test_cache_dir(monkeypatch, tmp_path):
    cache_dir = runtime.cache_dir.__wrapped__
    monkeypatch.setenv("DEEPGEMM_JAX_CACHE_DIR", str(tmp_path / "chosen"))
    assert cache_dir() == tmp_path / "chosen"
    monkeypatch.delenv("DEEPGEMM_JAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "deepgemm_jax"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "deepgemm_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "deepgemm_jax"


def test_a_user_without_a_home_has_a_cache_too(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DEEPGEMM_JAX_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert runtime.cache_dir.__wrapped__().is_absolute()


def test_the_cache_dir_stays_what_the_extension_was_told(monkeypatch, tmp_path):
    before = deepgemm_jax.cache_info().directory
    monkeypatch.setenv("DEEPGEMM_JAX_CACHE_DIR", str(tmp_path))
    assert deepgemm_jax.cache_info().directory == before


def test_the_extension_uses_the_cache_dir(tmp_path):
    folder = tmp_path / "chosen"
    program = "import deepgemm_jax as d; assert d.warmup_shapes([(1, 128, 128)]) == 1"
    run_python("-c", program, DEEPGEMM_JAX_CACHE_DIR=str(folder))
    assert list(folder.glob("*.cubin"))


def test_first_calls_after_warmup_compile_nothing(cache):
    missing = deepgemm_jax.warmup_shapes(SHAPES)
    assert missing == deepgemm_jax.cache_info().entries > 0

    before = deepgemm_jax.cache_info()
    for shape in SHAPES:
        first_call(*shape)
    after = deepgemm_jax.cache_info()
    assert after.compiled == before.compiled
    assert after.disk_hits == before.disk_hits + len(SHAPES)

    assert deepgemm_jax.warmup_shapes(SHAPES) == 0


def test_warmup_compiles_every_variant(cache, monkeypatch):
    some = gemm.variants(DEVICE)[::16]  # all of them take a minute
    monkeypatch.setattr(gemm, "variants", lambda device: some)
    monkeypatch.setattr(attention, "logits_variants", lambda device: [])
    casts = {quantize.ROWS: quantize.variants()[quantize.ROWS][:1]}
    monkeypatch.setattr(quantize, "variants", lambda: casts)
    count = len(some) + len(attention.TOPK_VARIANTS) + len(layout.variants())
    count += len(training.variants()) + 2  # that cast, and the search for runs of rows
    assert deepgemm_jax.warmup(jobs=2) == count
    assert deepgemm_jax.cache_info().entries == count
    assert deepgemm_jax.warmup() == 0


def test_warmup_for_a_gpu_without_kernels(cache, monkeypatch):
    monkeypatch.setattr(runtime, "cuda_device", lambda: Device("sm_80", 108, 166912, 2039))
    with pytest.raises(NotImplementedError, match="no kernels for sm_80, only for sm_90a"):
        deepgemm_jax.warmup_shapes([(1, 128, 128)])


def test_no_shapes_no_work(cache):
    assert deepgemm_jax.warmup_shapes([]) == deepgemm_jax.warmup_shapes([(0, 128, 128)]) == 0
    assert deepgemm_jax.cache_info().entries == 0


def test_clear_cache_takes_kernels_only(cache):
    assert deepgemm_jax.warmup_shapes([(1, 128, 128)]) == 1
    mine = cache / "notes.cubin"
    mine.write_text("not a kernel")
    deepgemm_jax.clear_cache()
    assert deepgemm_jax.cache_info().entries == deepgemm_jax.cache_info().size_bytes == 0
    assert list(cache.iterdir()) == [mine]
    assert deepgemm_jax.warmup_shapes([(1, 128, 128)]) == 1


def test_clear_and_info_without_a_folder(cache):
    deepgemm_jax.clear_cache()
    assert deepgemm_jax.cache_info().entries == 0
    assert deepgemm_jax.cache_info().directory == cache


def test_info_while_another_process_clears(cache):
    assert deepgemm_jax.warmup_shapes([(1, 128, 128)]) == 1
    # Listed, yet not there when it is asked for its size.
    (cache / ("0" * 64 + ".cubin")).symlink_to("deleted")
    assert deepgemm_jax.cache_info().entries == 1


def test_a_failure_loses_no_other_variant(cache):
    first = gemm.variants()[0]
    good = runtime.Variant(first.source, first.integers, DEVICE.arch)
    bad = runtime.Variant("no/such.cuh", (), DEVICE.arch)
    with pytest.raises(RuntimeError, match="no/such.cuh"):
        runtime.compile_variants([bad, good], jobs=1)
    [again] = runtime.compile_variants([good])
    assert again.cached


VARIANTS = [runtime.Variant("some.cuh", (i,), "sm_90a") for i in range(20)]


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Has workers die once asked; the file has a line for each variant that was."""
    worker, tried = tmp_path / "worker.py", tmp_path / "tried"
    worker.write_text(
        "import sys\n"
        f"with open({str(tried)!r}, 'a') as tried: tried.write(sys.stdin.readline())\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setattr(runtime._compile_worker, "__file__", str(worker))
    return tried


def test_a_worker_that_dies_loses_no_other_variant(tried):
    with pytest.raises(RuntimeError, match=r"compile .*config=\(0,\).* ended with code 3"):
        runtime.compile_variants(VARIANTS[:4], jobs=1)
    assert len(tried.read_text().splitlines()) == 4


# At once, or so that it cannot be started again.
@pytest.mark.parametrize("program", ["exit 3", 'rm "$0"; exit 3'])
def test_workers_that_cannot_be_asked(tmp_path, monkeypatch, program):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    done = []
    with pytest.raises(RuntimeError, match=r"compile .*config=\(0,\).* ended with code 3"):
        runtime.compile_variants(VARIANTS[:4], jobs=1, on_done=lambda: done.append(1))
    assert len(done) == 4


def test_an_interrupt_ends_a_warmup(tried):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.compile_variants(VARIANTS, jobs=1, on_done=interrupt)
    assert len(tried.read_text().splitlines()) < len(VARIANTS)


@pytest.mark.gpu
def test_first_calls_on_a_gpu_compile_nothing(cache):
    deepgemm_jax.warmup_shapes(SHAPES)
    program = f"""
import deepgemm_jax, jax.numpy as jnp
for m, n, k in {SHAPES}:
    a = jnp.ones((m, k), jnp.float8_e4m3fn), jnp.ones((m, -(-k // 128)))
    b = jnp.ones((n, k), jnp.float8_e4m3fn), jnp.ones((-(-n // 128), -(-k // 128)))
    deepgemm_jax.fp8_gemm_nt(a, b, implementation="cuda")
info = deepgemm_jax.cache_info()
assert info.compiled == 0 < info.disk_hits, info
"""
    run_python(
        "-c", program, DEEPGEMM_JAX_CACHE_DIR=str(cache), XLA_PYTHON_CLIENT_PREALLOCATE="false"
    )


def test_workers_leave_the_script_alone(cache, tmp_path):
    """A user's script has no ``if __name__`` guard, and to run it again may take minutes."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, deepgemm_jax\n"
        f"with open({str(tmp_path / 'runs')!r}, 'a') as runs: runs.write('run ')\n"
        "deepgemm_jax.warmup_shapes([(1, 128, 128), (4096, 4096, 4096)], jobs=2)\n"
    )
    run_python(script, DEEPGEMM_JAX_CACHE_DIR=str(cache))
    assert (tmp_path / "runs").read_text() == "run "
