"""The configs of the indexer's kernels, and the choice among them."""

import dataclasses
import functools

from .. import _C
from .._core.device import H200, Device

LOGITS_SOURCE = "attention/sm90_logits.cuh"
TOPK_SOURCE = "attention/sm90_topk.cuh"
# To how many heads those of a query are filled up, and how wide a product may be: the first is that
# of one query. With 256 columns of 16 heads, and by NVRTC 13.5 of 32, registers spill.
WIDTHS = {16: (16, 64, 128), 32: (32, 64, 128), 64: (64, 128, 256), 128: (128, 256)}
MAX_HEADS = max(WIDTHS)
MAX_STAGES = 8  # of 64 keys. With more on their way, memory delivers fewer a second.


@dataclasses.dataclass(frozen=True)
class LogitsConfig:
    """One variant of the kernel: see ``csrc/attention/config.h``, which lists the same integers."""

    heads: int
    columns: int
    query_groups: int
    key_groups: int
    stages: int


def _logits_config(
    heads: int, columns: int, groups: tuple[int, int], device: Device
) -> LogitsConfig:
    def smem(stages: int) -> int:
        return _C.logits_smem_bytes([heads, columns, *groups, stages])

    stages = min(MAX_STAGES, (device.smem_bytes - smem(0)) // (smem(1) - smem(0)))
    # A slot is always the same consumer's: another might take a round of it for the one before.
    return LogitsConfig(heads, columns, *groups, stages // groups[1] * groups[1])


def _multiple_of_heads(queries: int) -> int:
    """What their number must be one of for a product of so many queries: two and more take turns in
    each eight columns, one lies as it is."""
    return 1 if queries == 1 else 8 // min(queries, 4)


@functools.cache
def choose_logits(queries: int, heads: int, device: Device) -> LogitsConfig:
    """The config for sequences of so many queries each, of at most 128 heads.

    The wider a product, the fewer bytes of shared memory it needs. Two consumers have queries of
    their own, so that a key read from L2 serves as many as possible, or where there are too few
    queries for that, take the tiles of keys in turn.
    """
    filled = next(h for h in WIDTHS if heads <= h)
    widths = [
        columns for columns in WIDTHS[filled] if heads % _multiple_of_heads(columns // filled) == 0
    ]
    for columns in widths:
        if queries * filled <= columns:
            return _logits_config(filled, columns, (1, 2), device)
    return _logits_config(filled, widths[-1], (2, 1), device)


def logits_variants(device: Device = H200) -> list[LogitsConfig]:
    """Every config that `choose_logits` may return."""
    return sorted(
        {
            choose_logits(queries, heads, device)
            for queries in range(1, 18)
            for heads in range(1, MAX_HEADS + 1)
        },
        key=dataclasses.astuple,
    )


@dataclasses.dataclass(frozen=True)
class TopkConfig:
    """One variant of the kernel: see ``csrc/attention/config.h``."""

    float32: int


TOPK_VARIANTS = [TopkConfig(float32) for float32 in (0, 1)]
