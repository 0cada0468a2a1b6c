"""The configs of the indexer's kernels, and the choice among them."""

import dataclasses
import functools

from .. import _C
from .._core.device import H200, Device

LOGITS_SOURCE = "attention/sm90_logits.cuh"
TOPK_SOURCE = "attention/sm90_topk.cuh"
# To how many heads those of a query are filled up, and how wide a product of few queries may be.
FEW_QUERIES = {16: (64, 128, 256), 32: (64, 128, 256), 64: (64, 128, 256), 128: (128, 256)}
MANY_QUERIES = 256
MAX_HEADS = max(FEW_QUERIES)
MAX_STAGES = 12  # more than the latency of memory needs


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
    return LogitsConfig(heads, columns, *groups, stages)


@functools.cache
def choose_logits(queries: int, heads: int, device: Device) -> LogitsConfig:
    """The config for sequences of so many queries each, of at most 128 heads.

    The wider a product, the fewer bytes of shared memory it needs. Two consumers have queries of
    their own, so that a key read from L2 serves as many as possible, or where there are too few
    queries for that, keys of their own.
    """
    heads = next(h for h in FEW_QUERIES if heads <= h)
    for columns in FEW_QUERIES[heads]:
        if queries * heads <= columns:
            return _logits_config(heads, columns, (1, 2), device)
    return _logits_config(heads, MANY_QUERIES, (2, 1), device)


def logits_variants(device: Device = H200) -> list[LogitsConfig]:
    """Every config that `choose_logits` may return."""
    return [
        *(
            _logits_config(heads, columns, (1, 2), device)
            for heads, widths in FEW_QUERIES.items()
            for columns in widths
        ),
        *(_logits_config(heads, MANY_QUERIES, (2, 1), device) for heads in FEW_QUERIES),
    ]


@dataclasses.dataclass(frozen=True)
class TopkConfig:
    """One variant of the kernel: see ``csrc/attention/config.h``."""

    float32: int


TOPK_VARIANTS = [TopkConfig(float32) for float32 in (0, 1)]
