"""The variants of the quantising kernels, in the integers of ``csrc/quantize/config.h``."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp

ROWS = "quantize/sm90_rows.cuh"
TILES = "quantize/sm90_tiles.cuh"

FUNCTIONS = (
    "cast",
    "scaled",
    "whole_rows",
    "activated",
    "activated_backward",
    "gated",
    "gated_backward",
)
WHOLE_ROW = 8 * 256 * 8  # elements of the longest row that a CTA holds in registers

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
TILINGS = ("per_channel", "per_block", "both_ways", "per_block_both_ways")


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """Blocks of a row: one variant of ``sm90_rows.cuh``."""

    function: int
    activation: int
    float32: int
    e5m2: int


@dataclasses.dataclass(frozen=True)
class TilesConfig:
    """Blocks of a column and of both: one variant of ``sm90_tiles.cuh``."""

    tiling: int
    float32: int
    e5m2: int


def rows(function: str, activation: str, operand: Any, dtype: Any) -> RowsConfig:
    kinds = FUNCTIONS.index(function), ACTIVATIONS.index(activation)
    return RowsConfig(*kinds, *_dtypes(operand, dtype))


def tiles(tiling: str, operand: Any, dtype: Any) -> TilesConfig:
    return TilesConfig(TILINGS.index(tiling), *_dtypes(operand, dtype))


def _dtypes(operand: Any, dtype: Any) -> tuple[int, int]:
    return int(operand == jnp.float32), int(dtype == jnp.float8_e5m2)


def variants() -> dict[str, list[Any]]:
    """Of each source every config that an op may ask for."""
    dtypes = [(float32, e5m2) for float32 in (0, 1) for e5m2 in (0, 1)]
    casts, activating = range(3), range(3, len(FUNCTIONS))
    kinds = [
        *itertools.product(casts, (0,)),
        *itertools.product(activating, range(len(ACTIVATIONS))),
    ]
    return {
        ROWS: [RowsConfig(*kind, *dtype) for kind in kinds for dtype in dtypes],
        TILES: [TilesConfig(tiling, *dtype) for tiling in range(len(TILINGS)) for dtype in dtypes],
    }
