"""The GEMM's kernel configs, and the choice among them by a model of what each costs."""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from .. import _C
from .._core.device import H200, Device

MAX_STAGES = 12  # more than the latency of memory needs
ROW_BYTES = 128  # of an operand's tile, along the dim that is contiguous

# In the order of the enumerations of the same names in csrc.
ELEMENTS = tuple(map(jnp.dtype, (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16)))
SCALES = ("none", "blocks", "channels", "rows")
GROUPS = ("dense", "contiguous", "masked", "along_k")
ROW_GROUPS = ("contiguous", "masked")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the choice of a config depends on."""

    m: int  # of one group, as is likely
    n: int
    k: int  # of one group too, if it is K that is divided among them
    batch: int  # or groups
    out_dtype: Any
    accumulate: bool
    a_dtype: Any = jnp.float8_e4m3fn
    b_dtype: Any = jnp.float8_e4m3fn
    a_mn_major: bool = False
    b_mn_major: bool = False
    scales: str = "blocks"
    groups: str = "dense"

    @property
    def out_float32(self) -> bool:
        return jnp.dtype(self.out_dtype) == jnp.float32

    @property
    def block_k(self) -> int:
        return ROW_BYTES // jnp.dtype(self.a_dtype).itemsize

    @property
    def variant(self) -> dict[str, int]:
        """The parts of a config that the problem decides."""
        return {
            "out_float32": int(self.out_float32),
            "accumulate": int(self.accumulate),
            "a_type": ELEMENTS.index(jnp.dtype(self.a_dtype)),
            "b_type": ELEMENTS.index(jnp.dtype(self.b_dtype)),
            "a_mn_major": int(self.a_mn_major),
            "b_mn_major": int(self.b_mn_major),
            "scales": SCALES.index(self.scales),
            "groups": GROUPS.index(self.groups),
        }


@dataclasses.dataclass(frozen=True)
class AnyConfig:
    """What the configs of both kernels have in common."""

    source: ClassVar[str]

    @property
    def integers(self) -> tuple[int, ...]:
        return tuple(vars(self).values())

    @property
    def smem_bytes(self) -> int:
        return _C.gemm_smem_bytes(self.source, self.integers)

    def num_sms(self, device: Device) -> int:
        """The multiprocessors that its clusters may fill."""
        return device.num_sms

    def validate(self, problem: Problem, device: Device) -> None:
        """Raises a ValueError that says what does not fit."""
        for holds, rule in self._rules(problem, device):
            if not holds:
                raise ValueError(f"config is {self}, wanted {rule}")

    def fits(self, problem: Problem, device: Device) -> bool:
        return all(holds for holds, _ in self._rules(problem, device))

    def _rules(self, problem: Problem, device: Device) -> Iterator[tuple[bool, str]]:
        # Each may rely on those before it: the extension divides by these integers.
        yield from self._shape(device)
        yield from self._form(problem)
        smem = self.smem_bytes
        yield (
            smem <= device.smem_bytes,
            f"at most {device.smem_bytes} bytes of shared memory, not {smem}",
        )

    def _shape(self, device: Device) -> Iterator[tuple[bool, str]]:
        raise NotImplementedError

    def _form(self, problem: Problem) -> Iterator[tuple[bool, str]]:
        for name, value in problem.variant.items():
            if hasattr(self, name):
                yield getattr(self, name) == value, f"{name}={value}, as the operands have it"


@dataclasses.dataclass(frozen=True)
class Config(AnyConfig):
    """One variant of the kernel: see ``csrc/gemm/config.h``, which lists the same integers."""

    source: ClassVar[str] = "gemm/sm90.cuh"

    block_m: int
    block_n: int
    stages: int
    consumers: int
    cluster_m: int
    cluster_n: int
    out_float32: int
    accumulate: int
    a_type: int
    b_type: int
    a_mn_major: int
    b_mn_major: int
    scales: int
    groups: int

    @property
    def _waves(self) -> float:
        return self.block_m / (64 * self.consumers)

    def _shape(self, device: Device) -> Iterator[tuple[bool, str]]:
        yield self.consumers in (1, 2, 3), "1 to 3 consumers"
        yield self._waves in (1, 2), "block_m = 64 or 128 for each consumer"
        yield self.block_n in range(16, 257, 16), "block_n a multiple of 16, at most 256"
        cluster = sorted((self.cluster_m, self.cluster_n))
        yield cluster in ([1, 1], [1, 2]), "a cluster of one CTA or two"
        yield 2 <= self.stages <= MAX_STAGES, f"2 to {MAX_STAGES} stages"

    def _form(self, problem: Problem) -> Iterator[tuple[bool, str]]:
        yield from super()._form(problem)
        if problem.scales in ("channels", "rows"):
            yield self.block_n % 64 == 0, "block_n a multiple of 64 with a scale for each column"
        if problem.scales == "rows":
            yield self._waves == 1, "block_m = 64 for each consumer with a scale for each row"
        for part, mn_major in (
            (self.block_m // self.cluster_n, problem.a_mn_major),
            (self.block_n // self.cluster_m, problem.b_mn_major),
        ):
            yield not mn_major or part % 64 == 0, "loads of whole 64 rows where K is not contiguous"
        # Sums and one product of FP8 for each thread, its factors if each column has a scale, and
        # what addresses take.
        others = {"none": 0, "channels": 2}.get(problem.scales, 1)
        registers = int((self._waves + others) * self.block_n / 2 + 24)
        available = {1: 255, 2: 232, 3: 152}[self.consumers]
        yield registers <= available, f"at most {available} registers a thread, not {registers}"


@dataclasses.dataclass(frozen=True)
class Runs:
    """The only variant of the kernel that goes before the product of rows told by id."""

    source: ClassVar[str] = "gemm/runs.cuh"


@dataclasses.dataclass(frozen=True)
class FewRows(AnyConfig):
    """One variant of the kernel for few rows: see ``csrc/gemm/config.h`` too."""

    source: ClassVar[str] = "gemm/sm90_few_rows.cuh"

    block_m: int
    consumers: int
    stages: int
    split: int
    out_float32: int
    accumulate: int
    a_type: int
    b_type: int
    scales: int

    def num_sms(self, device: Device) -> int:
        # Clusters do not cross the borders of the chip's parts, which leaves some of it idle.
        whole = device.num_sms if self.split <= 2 else device.num_sms * 10 // 11
        return max(whole // self.split, 1) * self.split

    def _shape(self, device: Device) -> Iterator[tuple[bool, str]]:
        yield self.block_m in (8, 16, 32, 64, 128), "block_m = 8, 16, 32, 64 or 128"
        yield self.consumers in (1, 2, 3), "1 to 3 consumers"
        most = min(8, device.num_sms)
        yield self.split in range(1, most + 1), f"K divided among 1 to {most} CTAs"
        yield 2 <= self.stages <= MAX_STAGES, f"2 to {MAX_STAGES} stages"

    def _form(self, problem: Problem) -> Iterator[tuple[bool, str]]:
        yield problem.scales in ("none", "blocks"), "no scales, or scales of blocks"
        yield problem.groups == "dense", "a dense GEMM"
        k_major = not problem.a_mn_major and not problem.b_mn_major
        yield k_major, "operands whose K is contiguous"
        yield from super()._form(problem)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A shape of tile, and its cost with all multiprocessors of an H100 at work."""

    block_m: int
    block_n: int
    consumers: int
    cluster_m: int
    cluster_n: int
    block_us: float  # for each 128 bytes of K
    store_us: float  # for each tile, beyond its blocks
    rows: float = 0.95  # times a block's cost, if scales are the same for all of K
    groups: float = 1.04  # times a block's cost, if there are groups of rows

    @property
    def slices(self) -> int:
        """In so many a tile of the last round may be divided, a consumer's rows each."""
        whole = self.cluster_m == 1 and self.block_m == 64 * self.consumers
        return self.consumers if whole else 1


FP8_TILES = (
    Tile(256, 128, 2, 1, 2, 0.695, 1.30),
    Tile(192, 128, 3, 1, 2, 0.530, 0.56, rows=1.01),
    Tile(128, 192, 2, 1, 1, 0.557, 0.71, rows=0.94),
    Tile(128, 160, 2, 1, 1, 0.476, 0.79, groups=1.02),
    Tile(128, 128, 2, 1, 1, 0.399, 0.33, groups=1.05),
    Tile(128, 64, 2, 1, 1, 0.248, 0.25),
    Tile(64, 128, 1, 1, 1, 0.257, 0.30, groups=1.18),
    Tile(64, 64, 1, 1, 1, 0.172, 0.34),
)
BF16_TILES = (
    Tile(128, 256, 2, 1, 1, 0.658, 1.26, groups=1.0),
    Tile(128, 128, 2, 1, 1, 0.379, 0.21, groups=0.93),
    Tile(64, 128, 1, 1, 1, 0.245, 0.30),
)
# Not for groups, which fill the GPU without those for small problems and odd widths, and are faster
# where a pair shares A.
DENSE_FP8_TILES = (
    Tile(192, 128, 3, 1, 1, 0.535, 0.72, rows=1.02),
    Tile(192, 96, 3, 1, 1, 0.478, 0.32),
    Tile(128, 144, 2, 1, 1, 0.439, 1.24),
    Tile(128, 96, 2, 1, 1, 0.310, 0.50),
    Tile(128, 32, 2, 1, 1, 0.176, 0.30),
    Tile(64, 32, 1, 1, 1, 0.130, 0.30),
    Tile(64, 16, 1, 1, 1, 0.120, 0.19),
)
DENSE_BF16_TILES = (
    Tile(128, 64, 2, 1, 1, 0.310, 0.40),
    Tile(64, 64, 1, 1, 1, 0.180, 0.8),
)
CHANNELS = 1.23  # times a block's cost, if there is a scale for each column
# Of a round, what one of slices takes, if scales are of blocks or the same for all of K.
SLICED = {"blocks": {2: 0.78, 3: 0.69}, "rows": {2: 0.68, 3: 0.6}}
LAUNCH_US = 3.02  # until the first bytes are there
CLUSTER_US = 0.4  # until the CTAs of a cluster have found each other
READ = 0.835  # of what device memory moves at most
# So many bytes an H200's L2 hands to each multiprocessor, if all are at work; and if rows begin
# anywhere in a line of it.
LOADED_PER_US = 94e3
ACROSS_LINES_PER_US = 85e3
LINE_BYTES = 128
L2_BYTES = 50e6
WRITTEN_BACK_US = 0.05e-6  # for each byte, as long as L2 is full of what was written before
KEPT = 0.5  # of a byte read, what one costs that is written and stays in L2

# Of the kernel for few rows: rows of A in a tile, consumers, and the CTAs that divide K.
FEW_ROWS = (
    *((8, 1, split) for split in (1, 2, 3, 4, 8)),
    *((32, 1, split) for split in (1, 2, 3, 8)),
    *((64, 1, split) for split in (1, 2, 3, 4, 8)),
    (64, 2, 1),
    *((128, 1, split) for split in (1, 2, 3)),
    (128, 2, 2),
    (128, 3, 1),
)
FEW = 32  # Tiles of twice as many rows as A has are left out, with A's counted as no fewer.
# Until the first bytes are there; the bytes of A and B that one multiprocessor multiplies, and
# promotes if they have scales; those that it exchanges in its cluster; an element's store.
FIRST_BYTES_US = 2.92
MULTIPLIED_PER_US = {"blocks": 86e3, "none": 190e3}
EXCHANGED_PER_US = 17.5e3
STORE_US = 5.8e-5
# So many bytes under way to a multiprocessor are enough, and so many stages. The more there are,
# the later come those that were asked for first.
IN_FLIGHT = 96 * 1024
FEW_STAGES = 5


def _deepest(config: Callable[[int], Any], device: Device, most: int = MAX_STAGES) -> Any:
    """The config with as many stages as fit, but no more than the `most` that are of use."""
    none, one = (config(stages).smem_bytes for stages in (0, 1))
    return config(min(most, (device.smem_bytes - none) // (one - none)))


def _configs(problem: Problem, device: Device) -> Iterator[tuple[Tile, Config]]:
    bf16, dense = problem.scales == "none", problem.groups == "dense"
    tiles: tuple[Tile, ...] = BF16_TILES if bf16 else FP8_TILES
    if dense and not problem.a_mn_major and not problem.b_mn_major:
        tiles += DENSE_BF16_TILES if bf16 else DENSE_FP8_TILES
    for tile in tiles:
        shape = tile.block_m, tile.block_n, tile.consumers, tile.cluster_m, tile.cluster_n
        block_m, block_n, *others = shape

        def config(stages: int) -> Config:
            return Config(block_m, block_n, stages, *others, **problem.variant)  # noqa: B023

        deepest = _deepest(config, device)
        if deepest.fits(problem, device):
            yield tile, deepest


def _few_rows(problem: Problem, device: Device) -> Iterator[FewRows]:
    if problem.m > max(block_m for block_m, *_ in FEW_ROWS):
        return
    fields = {field.name for field in dataclasses.fields(FewRows)}
    form = {name: value for name, value in problem.variant.items() if name in fields}
    for block_m, consumers, split in FEW_ROWS:
        if block_m >= 2 * max(problem.m, FEW):
            continue
        slot = (block_m + 64 * consumers) * ROW_BYTES
        enough = min(MAX_STAGES, max(FEW_STAGES, math.ceil(IN_FLIGHT / slot)))

        def config(stages: int) -> FewRows:
            return FewRows(block_m, consumers, stages, split, **form)  # noqa: B023

        deepest = _deepest(config, device, enough)
        if deepest.fits(problem, device):
            yield deepest


def _row_bytes(problem: Problem) -> int:
    return math.ceil(problem.k / problem.block_k) * ROW_BYTES


def _moved_bytes(problem: Problem) -> tuple[int, int]:
    """What is read and what is written."""
    d = problem.m * problem.n * (4 if problem.out_float32 else 2)
    operands = (problem.m + problem.n) * _row_bytes(problem)
    return problem.batch * (operands + problem.accumulate * d), problem.batch * d


def _read_us(moved: float, device: Device) -> float:
    return moved / (READ * device.memory_gbs * 1e3)


@functools.cache
def _likely_sizes(groups: int, kind: str) -> np.ndarray:
    """[draws, groups]: how many times the mean a group may be. Only the device knows; a router
    that balances its load leaves some 0.7 to 1.3."""
    draws, rng = 32, random.Random(0)
    # Each group's are spread evenly, and come in an order of their own (a Latin hypercube).
    place = np.array([rng.sample(range(draws), draws) for _ in range(groups)]).T
    sizes = 0.7 + 0.6 * (place + 0.5) / draws
    # The sum of contiguous groups is known.
    return sizes / sizes.mean(1, keepdims=True) if kind == "contiguous" else sizes


def _block_us(problem: Problem, tile: Tile, at_work: float) -> float:
    """A tile's block of K, multiplied or, if that takes longer, loaded, with such a part of all
    multiprocessors at work."""
    block_us = tile.block_us * {"channels": CHANNELS, "rows": tile.rows}.get(problem.scales, 1)
    if problem.groups in ROW_GROUPS:
        block_us *= tile.groups
    contiguous = (
        problem.m if problem.a_mn_major else problem.k,
        problem.n if problem.b_mn_major else problem.k,
    )
    across = any(n * jnp.dtype(problem.a_dtype).itemsize % LINE_BYTES for n in contiguous)
    per_us = ACROSS_LINES_PER_US if across else LOADED_PER_US
    loaded = min(problem.m, tile.block_m) / tile.cluster_n + tile.block_n / tile.cluster_m
    return max(block_us, at_work * loaded * ROW_BYTES / per_us)


def _seconds(problem: Problem, tile: Tile, device: Device) -> float:
    """The rounds of tiles over the multiprocessors, and the bytes to move meanwhile."""
    cluster = tile.cluster_m * tile.cluster_n
    rows = problem.m / (tile.block_m * tile.cluster_m)
    columns = math.ceil(problem.n / (tile.block_n * tile.cluster_n))
    at_once = device.num_sms // cluster
    tiles = problem.batch * math.ceil(rows) * columns
    if problem.groups in ROW_GROUPS:
        drawn = np.ceil(rows * _likely_sizes(problem.batch, problem.groups)).sum(1) * columns
        rounds = np.ceil(drawn / at_once).mean()
    else:
        rounds, rest = divmod(tiles, at_once)
        if rest:
            sliced = rounds and rest * tile.slices <= at_once
            rounds += SLICED.get(problem.scales, {}).get(tile.slices, 1) if sliced else 1
    blocks = math.ceil(problem.k / problem.block_k)
    block_us = _block_us(problem, tile, min(1, tiles / at_once))
    # The last store begins when all is read.
    busy_us = rounds * (blocks * block_us + tile.store_us) - tile.store_us
    read, written = _moved_bytes(problem)
    memory_us = _read_us(read + written * (KEPT if _C.l2_may_hold(written) else 1), device)
    memory_us += min(read + written, L2_BYTES) * WRITTEN_BACK_US
    # Neither hides the other wholly when they are nearly alike: their 4-norm is what fits.
    both_us = (busy_us**4 + memory_us**4) ** (1 / 4)
    us = LAUNCH_US + (cluster > 1) * CLUSTER_US + both_us + tile.store_us
    return float(us) * 1e-6


def _few_rows_seconds(problem: Problem, config: FewRows, device: Device) -> float:
    """Reading and multiplying, of which neither hides the other wholly when they are nearly alike;
    then the exchange of sums and the store, for each tile."""
    rows, columns, split = config.block_m, 64 * config.consumers, config.split
    tiles_m, tiles_n = math.ceil(problem.m / rows), math.ceil(problem.n / columns)
    rounds = math.ceil(problem.batch * tiles_m * tiles_n / (config.num_sms(device) // split))
    blocks = math.ceil(problem.k / problem.block_k)
    read_us = _read_us(sum(_moved_bytes(problem)), device)
    multiplied = rounds * math.ceil(blocks / split) * (rows + columns) * ROW_BYTES
    multiply_us = multiplied / MULTIPLIED_PER_US[problem.scales]
    exchange_us = rounds * (split - 1) / split * rows * columns * 4 / EXCHANGED_PER_US
    store_us = rounds * min(rows, problem.m) * columns / split * STORE_US
    both_us = math.hypot(read_us, multiply_us)
    first_us = FIRST_BYTES_US + (split > 1) * CLUSTER_US
    return (first_us + both_us + exchange_us + store_us) * 1e-6


def candidates(problem: Problem, device: Device) -> list[tuple[AnyConfig, float]]:
    """All configs for a problem with their predicted seconds, the best first.

    Of those that cost the same, tiles of fewer elements come first: they waste less at the edges.
    """
    costs: list[tuple[float, int, AnyConfig]] = [
        (_seconds(problem, tile, device), tile.block_m * tile.block_n, config)
        for tile, config in _configs(problem, device)
    ]
    costs += [
        (_few_rows_seconds(problem, config, device), config.block_m * config.consumers * 64, config)
        for config in _few_rows(problem, device)
    ]
    costs.sort(key=lambda cost: cost[:2])
    return [(config, seconds) for seconds, _, config in costs]


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device) -> AnyConfig:
    """The config with the least predicted time."""
    return candidates(problem, device)[0][0]


def variants(device: Device = H200) -> list[AnyConfig]:
    """Every config that `choose` may return for FP8 in e4m3 and for bfloat16."""
    # So many rows that no tile is left out for holding twice as many.
    sizes: dict[str, Any] = {"m": 128, "n": 1, "k": 1, "batch": 1}
    forms: list[tuple[dict[str, Any], Sequence[str]]] = [
        ({"scales": "blocks"}, ("dense", "contiguous", "masked")),
        ({"scales": "rows"}, ("dense", "contiguous", "masked")),
        ({"scales": "channels"}, ("dense", "contiguous", "masked", "along_k")),
    ]
    for a_mn_major, b_mn_major in itertools.product((False, True), repeat=2):
        form = {
            "scales": "none",
            "a_dtype": jnp.bfloat16,
            "b_dtype": jnp.bfloat16,
            "a_mn_major": a_mn_major,
            "b_mn_major": b_mn_major,
        }
        groups = ["dense"]
        if not a_mn_major:
            groups.append("contiguous")
        if not a_mn_major and not b_mn_major:
            groups.append("masked")
        if a_mn_major == b_mn_major:
            groups.append("along_k")
        forms.append((form, groups))
    problems = (
        Problem(out_dtype=dtype, accumulate=accumulate, groups=group, **sizes, **form)
        for form, groups in forms
        for dtype, group in itertools.product((jnp.bfloat16, jnp.float32), groups)
        # There is no C where groups are of rows.
        for accumulate in ((False, True) if group in ("dense", "along_k") else (False,))
    )
    return [config for problem in problems for config, _ in candidates(problem, device)]


def by_source(configs: Iterable[AnyConfig]) -> dict[str, list[AnyConfig]]:
    """Of each kernel those that are its variants."""
    configs = list(configs)
    return {
        kernel.source: [config for config in configs if isinstance(config, kernel)]
        for kernel in (Config, FewRows)
    }
