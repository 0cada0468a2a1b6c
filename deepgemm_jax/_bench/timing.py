"""Time on the GPU, as CUPTI tells it for each kernel and for many in a row."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# The entry point of every kernel of this package; XLA's own are named after their fusions.
ENTRY_POINT = "kernel"

Kernels = list[tuple[str, float]]  # name, microseconds


class Timer(Protocol):
    calls: int

    def __call__(self, call: Callable[[], Any]) -> Kernels:
        """The kernels of all calls together."""


def mean_us(kernels: Kernels, calls: int, name: str | None = None) -> float:
    """Kernel time a call, of all kernels or of those of one name."""
    times = [us for kernel, us in kernels if name in (None, kernel)]
    if not times or len(times) % calls:
        seen = sorted({kernel for kernel, _ in kernels})
        raise RuntimeError(f"{len(times)} kernels named {name} in {calls} calls, of {seen}")
    return sum(times) / calls


class ColdTimer:
    """Kernels of calls that each find the L2 cache full of something else.

    Writing far more than the cache holds also gives the chip a rest from arithmetic, without which
    its clock falls.
    """

    def __init__(self, calls: int, flush_mb: int):
        self.calls = calls
        self._fill = jax.jit(lambda value: jnp.full((flush_mb, 2**18), value, jnp.uint32))
        self._flush()
        kernels = record(self._flush)
        if len(kernels) != 1:
            raise RuntimeError(f"the flush of the cache ran as {kernels}, not as one kernel")
        [(self._flush_kernel, _)] = kernels

    def __call__(self, call: Callable[[], Any]) -> Kernels:
        jax.block_until_ready(call())

        def run():
            for _ in range(self.calls):
                self._flush()
                result = call()
            jax.block_until_ready(result)

        # Which kernels were flushes is told by their name and, should XLA have given a kernel of
        # the call the same one, by their length. CUPTI promises no order.
        kernels = record(run)
        flushes = [kernel for kernel in kernels if kernel[0] == self._flush_kernel]
        for kernel in sorted(flushes, key=lambda kernel: kernel[1])[-self.calls :]:
            kernels.remove(kernel)
        return kernels

    def _flush(self) -> jax.Array:
        return self._fill(jnp.uint32(1))


def record(run: Callable[[], Any]) -> Kernels:
    """The kernels that ``run`` launches on the GPU."""
    # profiler.measure, the public face of this, times one jitted function called in a row. A flush
    # between calls has to be a program of its own, which XLA cannot move past the one measured.
    from jax.experimental.mosaic.gpu import profiler

    if profiler.mosaic_gpu_lib is None:
        raise RuntimeError("this jaxlib has no CUPTI: pip install 'jax[cuda13]'")
    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        kernels = cupti._cupti_get_timings(True)
    return [(name, ms * 1e3) for name, ms in kernels]


def timeline(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """Name, start and end in microseconds of each kernel that ``run`` launches on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        return sorted(
            (
                (event.name, event.start_ns / 1e3, (event.start_ns + event.duration_ns) / 1e3)
                for plane in planes
                if plane.name.startswith("/device:GPU")
                for line in plane.lines
                if line.name.startswith("Stream")
                for event in line.events
            ),
            key=lambda event: event[1],
        )


def repeat(call: Callable[[], Any], calls: int) -> Any:
    """The last call's result; the others' memory is free for the next."""
    for _ in range(calls):
        result = call()
    return result
