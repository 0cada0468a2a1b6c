"""The notation in which an op declares its operands and results.

An array is written ``dtype[dims]``, for instance ``float32[n/128 k/128]``:

- a dim names a *factor*: arrays that share it have the same length there;
- ``k/128`` counts the blocks of 128 of factor ``k``, the last of which may be partial; it stands
  in an array after one that has ``k`` itself;
- a factor that no operand has is the name of a static parameter that holds its length;
- ``bfloat16|float32`` allows either dtype; a word that is no dtype is the name of a static
  parameter that holds one;
- an operand whose name ends in ``?`` may be left out together with those after it.

Checks, result types, batching and the division among devices are all read from it.

In front of these dims an array may have batch dims, as many as the other arrays of the call; what
is the same for all of the batch has length 1 there. `vmap` adds one.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp


class Dim(NamedTuple):
    factor: str
    block: int = 1

    def length(self, sizes: Mapping[str, int]) -> int:
        return -(-sizes[self.factor] // self.block)

    def __str__(self) -> str:
        return self.factor if self.block == 1 else f"{self.factor}/{self.block}"


@dataclasses.dataclass(frozen=True)
class Array:
    """One operand or result of an op."""

    name: str
    dtypes: tuple[str, ...]
    dims: tuple[Dim, ...]

    @classmethod
    def parse(cls, name: str, notation: str) -> "Array":
        match = re.fullmatch(r"([\w|]+)\[(.*)\]", notation)
        assert match, notation
        words = [word.partition("/") for word in match[2].split()]
        dims = tuple(Dim(factor, int(block or 1)) for factor, _, block in words)
        return cls(name.rstrip("?"), tuple(match[1].split("|")), dims)

    def allowed(self, params: Any) -> tuple[jnp.dtype, ...]:
        return tuple(jnp.dtype(getattr(params, word, word)) for word in self.dtypes)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(dim.length(sizes) for dim in self.dims)

    def axis(self, factor: str) -> int | None:
        """Where the factor stands among the dims."""
        return next((i for i, dim in enumerate(self.dims) if dim.factor == factor), None)

    def __str__(self) -> str:
        return f"[{' '.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Call:
    """The operands that a call has, and the length of every factor and batch dim."""

    operands: tuple[Array, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: dict[str, int]
    batch: tuple[int, ...]


class Signature:
    """All operands and results of an op, and what holds between their shapes."""

    def __init__(
        self,
        op: str,
        operands: Mapping[str, str],
        results: Mapping[str, str],
        limits: Mapping[str, tuple[int, int]],
    ):
        self.op = op
        self.operands = tuple(Array.parse(*item) for item in operands.items())
        self.results = tuple(Array.parse(*item) for item in results.items())
        self.limits = limits
        arrays = self.operands + self.results
        # The multiple at which a factor may be cut without cutting a block.
        self.blocks: dict[str, int] = {}
        for dim in (dim for array in arrays for dim in array.dims):
            self.blocks[dim.factor] = max(dim.block, self.blocks.get(dim.factor, 1))
        # Factors that no result has: where one is cut, results are partial sums.
        self.contracted = tuple(
            factor
            for factor in self.blocks
            if all(array.axis(factor) is None for array in self.results)
        )
        # Factors whose lengths are static parameters.
        self.static = tuple(
            factor
            for factor in self.blocks
            if all(array.axis(factor) is None for array in self.operands)
        )

    def check(self, operands: Sequence[Any], params: Any) -> None:
        """Raises ValueError or TypeError for operands of one call that do not fit."""
        for array, operand in zip(self.operands, operands, strict=False):
            wanted = array.allowed(params)
            if operand.dtype not in wanted:
                raise TypeError(
                    f"{self.op}: {array.name} has dtype {operand.dtype}, wanted "
                    + " or ".join(dtype.name for dtype in wanted)
                )
        sizes = self.match([operand.shape for operand in operands], params, batch_dims=0).sizes
        for factor, (least, multiple) in self.limits.items():
            if sizes[factor] < least or sizes[factor] % multiple:
                name = next(a.name for a in self.operands if a.axis(factor) is not None)
                raise ValueError(
                    f"{self.op}: {name} has {factor} = {sizes[factor]}, wanted at least {least}"
                    + (f" and a multiple of {multiple}" if multiple > 1 else "")
                )

    def match(
        self, shapes: Sequence[tuple[int, ...]], params: Any, batch_dims: int | None = None
    ) -> Call:
        """The call that has operands of these shapes; ValueError where they disagree.

        The first operand tells how many batch dims there are, unless it is said.
        """
        operands = self.operands[: len(shapes)]
        if batch_dims is None:
            batch_dims = len(shapes[0]) - len(operands[0].dims)
        sizes: dict[str, int] = {factor: getattr(params, factor) for factor in self.static}
        source: dict[str, str] = {}
        for array, whole_shape in zip(operands, shapes, strict=True):
            shape = whole_shape[batch_dims:]
            if len(shape) != len(array.dims) or batch_dims > len(whole_shape):
                raise ValueError(
                    f"{self.op}: {array.name} has shape {whole_shape}, wanted "
                    f"{batch_dims + len(array.dims)} dimensions {array}"
                )
            for dim, length in zip(array.dims, shape, strict=True):
                if dim.block == 1 and dim.factor not in sizes:
                    sizes[dim.factor], source[dim.factor] = length, array.name
            if array.shape(sizes) != shape:
                known = ", ".join(
                    f"{dim.factor} = {sizes[dim.factor]} of {source[dim.factor]}"
                    for dim in array.dims
                )
                raise ValueError(
                    f"{self.op}: {array.name} has shape {shape}, wanted {array.shape(sizes)}, "
                    f"which is {array} with {known}"
                )
        lengths = zip(*(shape[:batch_dims] for shape in shapes), strict=True)
        batch = tuple(next((n for n in dim if n != 1), 1) for dim in lengths)
        return Call(operands, tuple(shapes), sizes, batch)
