"""The dense GEMM's kernel configs, and the choice among them by a model of what each costs."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from .. import _C
from .._core.device import H200, Device

SOURCE = "gemm/sm90.cuh"
MAX_STAGES = 12  # more than the latency of memory needs


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the choice of a config depends on."""

    m: int
    n: int
    k: int
    batch: int
    out_dtype: Any
    accumulate: bool

    @property
    def out_float32(self) -> bool:
        return jnp.dtype(self.out_dtype) == jnp.float32


@dataclasses.dataclass(frozen=True)
class Config:
    """One variant of the kernel: see ``csrc/gemm/config.h``, which lists the same integers."""

    block_m: int
    block_n: int
    stages: int
    consumers: int
    cluster_m: int
    cluster_n: int
    out_float32: int
    accumulate: int

    def validate(self, problem: Problem, device: Device) -> None:
        """Raises a ValueError that says what does not fit."""
        for holds, rule in self._rules(problem, device):
            if not holds:
                raise ValueError(f"fp8_gemm_nt: config is {self}, wanted {rule}")

    def _rules(self, problem: Problem, device: Device) -> Iterator[tuple[bool, str]]:
        # Each may rely on those before it: the extension divides by these integers.
        yield self.consumers in (1, 2, 3), "1 to 3 consumers"
        waves = self.block_m / (64 * self.consumers)
        yield waves in (1, 2), "block_m = 64 or 128 for each consumer"
        yield self.block_n in range(16, 257, 16), "block_n a multiple of 16, at most 256"
        cluster = sorted((self.cluster_m, self.cluster_n))
        yield cluster in ([1, 1], [1, 2]), "a cluster of one CTA or two"
        yield 2 <= self.stages <= MAX_STAGES, f"2 to {MAX_STAGES} stages"
        # Sums and one product for each thread, and what addresses and scales take.
        registers = int((waves + 1) * self.block_n / 2 + 24)
        available = {1: 255, 2: 232, 3: 160}[self.consumers]
        yield registers <= available, f"at most {available} registers a thread, not {registers}"
        yield (
            self.out_float32 == problem.out_float32,
            f"out_float32={int(problem.out_float32)} for a result of {problem.out_dtype}",
        )
        yield (
            self.accumulate == problem.accumulate,
            f"accumulate={int(problem.accumulate)}, which says whether C is given",
        )
        smem = _C.gemm_smem_bytes(dataclasses.astuple(self))
        yield (
            smem <= device.smem_bytes,
            f"at most {device.smem_bytes} bytes of shared memory, not {smem}",
        )


@dataclasses.dataclass(frozen=True)
class Tile:
    """A shape of tile, and its cost on an H200 with all multiprocessors at work."""

    block_m: int
    block_n: int
    consumers: int
    cluster_m: int
    cluster_n: int
    block_us: float  # for each 128 of K
    store_us: float  # for each tile, beyond its blocks


TILES = (
    Tile(256, 128, 2, 1, 2, 0.757, 1.3),
    Tile(192, 128, 3, 1, 2, 0.557, 0.9),
    Tile(192, 128, 3, 1, 1, 0.570, 0.9),
    Tile(128, 160, 2, 1, 1, 0.550, 1.0),
    Tile(128, 144, 2, 1, 1, 0.515, 1.0),
    Tile(128, 128, 2, 1, 2, 0.430, 0.9),
    Tile(128, 64, 2, 1, 1, 0.300, 0.8),
    Tile(128, 32, 2, 1, 1, 0.240, 0.7),
    Tile(64, 128, 1, 1, 1, 0.340, 0.9),
    Tile(64, 64, 1, 1, 1, 0.260, 0.8),
    Tile(64, 32, 1, 1, 1, 0.220, 0.7),
    Tile(64, 16, 1, 1, 1, 0.200, 0.7),
)
LAUNCH_US = 2.0
BYTES_PER_US = 4.5e6  # of device memory


def _config(tile: Tile, out_float32: bool, accumulate: bool, device: Device) -> Config:
    def config(stages: int) -> Config:
        return Config(
            tile.block_m,
            tile.block_n,
            stages,
            tile.consumers,
            tile.cluster_m,
            tile.cluster_n,
            int(out_float32),
            int(accumulate),
        )

    none, one = (_C.gemm_smem_bytes(dataclasses.astuple(config(s))) for s in (0, 1))
    return config(min(MAX_STAGES, (device.smem_bytes - none) // (one - none)))


def _seconds(problem: Problem, tile: Tile, device: Device) -> float:
    """The rounds of tiles over the multiprocessors, or the bytes to move if they take longer."""
    cluster = tile.cluster_m * tile.cluster_n
    clusters = (
        problem.batch
        * math.ceil(problem.m / (tile.block_m * tile.cluster_m))
        * math.ceil(problem.n / (tile.block_n * tile.cluster_n))
    )
    rounds = math.ceil(clusters / (device.num_sms // cluster))
    blocks = math.ceil(problem.k / 128)
    size = 4 if problem.out_float32 else 2
    moved = problem.batch * (
        (problem.m + problem.n) * problem.k
        + problem.m * problem.n * size * (2 if problem.accumulate else 1)
    )
    busy_us = rounds * (blocks * tile.block_us + tile.store_us)
    return (LAUNCH_US + max(busy_us, moved / BYTES_PER_US)) * 1e-6


def candidates(problem: Problem, device: Device) -> list[tuple[Config, float]]:
    """All configs for a problem with their predicted seconds, the best first.

    Of those that cost the same, tiles of fewer elements come first: they waste less at the edges.
    """
    costs = [(_seconds(problem, tile, device), tile) for tile in TILES]
    costs.sort(key=lambda cost: (cost[0], cost[1].block_m * cost[1].block_n))
    return [
        (_config(tile, problem.out_float32, problem.accumulate, device), seconds)
        for seconds, tile in costs
    ]


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device) -> Config:
    """The config with the least predicted time."""
    return candidates(problem, device)[0][0]


def variants(device: Device = H200) -> list[Config]:
    """Every config that `choose` may return."""
    return [
        _config(tile, out_float32, accumulate, device)
        for tile in TILES
        for out_float32 in (False, True)
        for accumulate in (False, True)
    ]
