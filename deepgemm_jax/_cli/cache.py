"""``cache`` and ``warmup``: the kernels on disk."""

from __future__ import annotations

from .. import runtime


def describe() -> str:
    cache = runtime.cache_info()
    return f"{cache.entries} kernels, {cache.size_bytes / 1e3:.0f} kB in {cache.directory}"


def info() -> None:
    print(describe())


def clear() -> None:
    print(f"deleting {describe()}")
    runtime.clear_cache()


def warmup(shapes: list[tuple[int, int, int]] | None, jobs: int | None) -> None:
    missing = runtime.warmup_shapes(shapes, jobs=jobs) if shapes else runtime.warmup(jobs=jobs)
    print(f"{missing} kernels compiled")
    info()
