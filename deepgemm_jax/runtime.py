"""Where kernels are compiled and kept: NVRTC, the disk cache, and filling it ahead of time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from . import _C, _compile_worker
from ._core.device import ARCHS, cuda_device
from ._progress import Progress


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel to compile: its source in csrc, its config's integers, the GPU's architecture."""

    source: str
    config: tuple[int, ...]
    arch: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling a variant took, and whether the disk cache had it already."""

    variant: Variant
    cached: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class CacheInfo:
    """The disk cache, and what this process took from it.

    ``compiled``, ``disk_hits`` and ``memory_hits`` count the kernels that this process compiled,
    read from the disk, or had in memory already.
    """

    directory: Path
    entries: int
    size_bytes: int
    compiled: int
    disk_hits: int
    memory_hits: int


@functools.cache  # the extension is told once, whatever becomes of the environment
def cache_dir() -> Path:
    """``DEEPGEMM_JAX_CACHE_DIR``, or else ``deepgemm_jax`` in the user's cache folder."""
    if chosen := os.environ.get("DEEPGEMM_JAX_CACHE_DIR"):
        return Path(chosen).absolute()
    # A relative path is to be ignored, says XDG's specification.
    if (caches := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return caches / "deepgemm_jax"
    try:
        return Path.home() / ".cache" / "deepgemm_jax"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"deepgemm_jax_{os.getuid()}"


def _library_folders() -> Iterator[Path]:
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia and nvidia.submodule_search_locations) or ():
        yield Path(root, "cu13", "lib")
        yield Path(root, "cuda_nvrtc", "lib")
    yield from map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")))
    yield from sorted(Path("/usr/local").glob("cuda*/lib64"))
    yield from sorted(Path("/usr/lib").glob("*-linux-gnu"))
    yield Path("/usr/lib64")


def find_nvrtc() -> list[Path]:
    """NVRTC's shared objects in the order in which they must be opened; empty if there is none.

    Those of pip's packages come before the system's, and before either those of a CUDA version that
    the driver knows: an older driver does not load what a newer major version has compiled.
    """
    newest = (_C.driver_version() or sys.maxsize) // 1000
    found = [
        [*sorted(folder.glob(f"libnvrtc-builtins.so.{major}.*"))[-1:], nvrtc]
        for folder in _library_folders()
        for major in range(13, 11, -1)
        if (nvrtc := folder / f"libnvrtc.so.{major}").exists()
    ]
    return min(found, key=lambda libraries: int(libraries[-1].suffix[1:]) > newest, default=[])


def clear_cache() -> None:
    """Delete every compiled kernel from the disk cache.

    Kernels that this process has loaded stay loaded.
    """
    for file in _cache_files("*"):
        file.unlink(missing_ok=True)


def cache_info() -> CacheInfo:
    """Where the disk cache is, what is in it, and what this process took from it."""
    sizes = []
    for file in _cache_files("cubin"):
        with contextlib.suppress(FileNotFoundError):  # another process has deleted it
            sizes.append(file.stat().st_size)
    return CacheInfo(cache_dir(), len(sizes), sum(sizes), **_C.statistics())


def _cache_files(suffix: str) -> Iterator[Path]:
    # By the form of their names, because the folder may hold other files: the user chose it.
    key = "[0-9a-f]" * 64
    return cache_dir().glob(f"{key}.{suffix}")


def warmup(*, jobs: int | None = None) -> int:
    """Compile every variant of every kernel for this machine's GPU; returns how many were missing.

    Left out are GEMMs with an operand in float8_e5m2, as gradients may be: the first call compiles
    theirs.

    ``jobs`` worker processes compile at once: by default as many as there are CPU cores.
    """
    from .attention import config as attention
    from .gemm import config as gemm
    from .layout import config as layout
    from .quantize import config as quantize
    from .training import op as training

    device = cuda_device()
    return _warmup(
        {
            **gemm.by_source(gemm.variants(device)),
            gemm.Runs.source: [gemm.Runs()],
            attention.LOGITS_SOURCE: attention.logits_variants(device),
            attention.TOPK_SOURCE: attention.TOPK_VARIANTS,
            layout.SOURCE: layout.variants(),
            **quantize.variants(),
            **training.variants(),
        },
        jobs,
    )


def warmup_shapes(
    shapes: Iterable[tuple[int, int, int]],
    *,
    preferred_element_type: DTypeLike = jnp.bfloat16,
    accumulate: bool = False,
    jobs: int | None = None,
) -> int:
    """Compile what :func:`fp8_gemm_nt` needs for shapes ``(m, n, k)``, ahead of their first call.

    The operands are in float8_e4m3fn; ``accumulate`` stands for calls with ``c=``. Where there is
    no GPU, the kernels are those for an H200, so that an image can be built with its cache filled.
    Returns how many were missing.

    >>> deepgemm_jax.warmup_shapes([(1, 4096, 7168), (4096, 4096, 7168)])  # doctest: +SKIP
    2
    """
    from .gemm import config as gemm

    problems = [
        gemm.Problem(m, n, k, batch=1, out_dtype=preferred_element_type, accumulate=accumulate)
        for m, n, k in shapes
        if m > 0
    ]
    device = cuda_device()
    return _warmup(gemm.by_source(gemm.choose(problem, device) for problem in problems), jobs)


def _warmup(configs: Mapping[str, Iterable[Any]], jobs: int | None) -> int:
    """Of each source, these configs."""
    arch = cuda_device().arch
    if arch not in ARCHS:
        raise NotImplementedError(f"there are no kernels for {arch}, only for {', '.join(ARCHS)}")
    variants = {
        Variant(source, dataclasses.astuple(config), arch)
        for source, of_source in configs.items()
        for config in of_source
    }
    with Progress("compile", len(variants)) as progress:
        compiled = compile_variants(variants, jobs=jobs, on_done=progress.advance)
    return sum(not result.cached for result in compiled)


def compile_variants(
    variants: Iterable[Variant],
    *,
    jobs: int | None = None,
    directory: Path | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> list[Compiled]:
    """Compile into the disk cache (or ``directory``) in worker processes.

    All variants are tried before the first failure is raised.
    """
    variants = list(variants)
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(variants)) or 1
    mine = threading.local()

    def compile_one(variant: Variant) -> Compiled:
        worker = getattr(mine, "worker", None)
        if worker is None or worker.poll() is not None:
            worker = workers.enter_context(_start_worker(directory or cache_dir()))
            mine.worker = worker
        return _ask(worker, variant)

    pool = ThreadPoolExecutor(jobs)
    with contextlib.ExitStack() as workers:
        try:
            tasks = [pool.submit(compile_one, variant) for variant in variants]
            for _ in as_completed(tasks):
                on_done()
        finally:
            pool.shutdown(cancel_futures=True)
    return [task.result() for task in tasks]


def _start_worker(directory: Path) -> subprocess.Popen:
    command = [sys.executable, "-I", "-S", _compile_worker.__file__]
    arguments = [_C.__file__, str(directory), *map(str, find_nvrtc())]
    # NVRTC would ask the driver's own cache too, and keep there what is kept here.
    environment = os.environ | {"CUDA_CACHE_DISABLE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command + arguments, stdin=pipe, stdout=pipe, text=True, env=environment
    )


def _ask(worker: subprocess.Popen, variant: Variant) -> Compiled:
    assert worker.stdin is not None and worker.stdout is not None
    try:
        print(json.dumps(dataclasses.astuple(variant)), file=worker.stdin, flush=True)
        line = worker.stdout.readline()
    except BrokenPipeError:  # it ended before it was asked
        line = ""
    if not line:
        with contextlib.suppress(BrokenPipeError):  # closing writes what could not be written
            worker.stdin.close()
        raise RuntimeError(f"the process to compile {variant} ended with code {worker.wait()}")
    answer = json.loads(line)
    if error := answer.get("error"):
        raise RuntimeError(error)
    return Compiled(variant, answer["cached"], answer["seconds"])


_C.configure(str(cache_dir()), [str(library) for library in find_nvrtc()])
