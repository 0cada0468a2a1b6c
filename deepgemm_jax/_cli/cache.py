"""``cache`` and ``warmup``: the kernels on disk."""

from __future__ import annotations

from .. import runtime


def info() -> None:
    cache = runtime.cache_info()
    print(f"{cache.directory}\n{cache.entries} kernels, {cache.size_bytes / 1e6:.1f} MB")


def clear() -> None:
    info()
    runtime.clear_cache()
    print("cleared")


def warmup(shapes: list[tuple[int, int, int]] | None, jobs: int | None) -> None:
    missing = runtime.warmup_shapes(shapes, jobs=jobs) if shapes else runtime.warmup(jobs=jobs)
    print(f"{missing} kernels compiled")
    info()
