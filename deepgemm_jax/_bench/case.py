"""What an op brings to be measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core.device import H200, cuda_device
from ..runtime import Variant

# What an H200's tensor cores reach over a millisecond, as an H100's do.
PEAK_TFLOPS = {"fp8": 1770.0, "bf16": 885.0}


def peak_gbs() -> float:
    """What reads of device memory reach: on an H200 4,545 of 4,917 GB/s."""
    return 4545 / H200.memory_gbs * cuda_device().memory_gbs


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def nbytes(tree: Any) -> int:
    """Of arrays, or of their types."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to jit and the arrays to pass: as constants, XLA would fold them away."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape."""

    program: Program
    flops: float
    bytes: float  # each operand read once, the result written once
    peak: str  # a key of PEAK_TFLOPS
    config: Mapping[str, int]
    variant: Variant
    error: Callable[[Any], float]  # of the program's result, against float64 or plain JAX
    others: Mapping[str, Program]  # measured beside it: a row's field, without "_us", and what
    chain: Callable[[int], Program] | None = None  # so many calls of the op in one program

    @property
    def floor_us(self) -> float:
        arithmetic = self.flops / (PEAK_TFLOPS[self.peak] * 1e6)
        return max(arithmetic, self.bytes / (peak_gbs() * 1e3))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An op under the name that the reference figures have for it, and its shapes."""

    op: str
    shapes: Sequence[tuple]
    chained: Sequence[tuple]  # the shapes at which a chain of calls is timed
    case: Callable[..., Case]  # of a shape's numbers
    compared_with: str | None = None  # the op of the reference figures, if it is another one
