"""The notation in which an op declares its operands and results.

An array is written ``dtype[dims]``, for instance ``float32[... n/128 k/128]``:

- a dim names a *factor*; arrays that share a factor have the same length there;
- ``k/128`` counts the blocks of 128 of factor ``k``, the last of which may be partial;
- a leading ``...`` is one batch dim that either all arrays marked so have or none has;
- ``bfloat16|float32`` allows either; a word that is no dtype is the name of a static parameter
  that holds one;
- an operand whose name ends in ``?`` may be left out together with those after it.

Shape and dtype checks, abstract evaluation, batching and partitioning all read this notation.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

BATCH = "..."


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
    optional: bool
    dtypes: tuple[str, ...]
    dims: tuple[Dim, ...]

    @classmethod
    def parse(cls, name: str, notation: str) -> "Array":
        match = re.fullmatch(r"([\w|]+)\[(.*)\]", notation)
        assert match, notation
        dims = [token.partition("/") for token in match[2].split()]
        return cls(
            name=name.rstrip("?"),
            optional=name.endswith("?"),
            dtypes=tuple(match[1].split("|")),
            dims=tuple(Dim(factor, int(block or 1)) for factor, _, block in dims),
        )

    def allowed(self, params: Any) -> tuple[jnp.dtype, ...]:
        return tuple(jnp.dtype(getattr(params, word, word)) for word in self.dtypes)

    def dims_of(self, sizes: Mapping[str, int]) -> tuple[Dim, ...]:
        """The dims without ``...`` where the problem has no batch."""
        return tuple(dim for dim in self.dims if dim.factor in sizes)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(dim.length(sizes) for dim in self.dims_of(sizes))

    def axis(self, factor: str, sizes: Mapping[str, int]) -> int | None:
        """Where the factor stands among this array's dims."""
        factors = [dim.factor for dim in self.dims_of(sizes)]
        return factors.index(factor) if factor in factors else None


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

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.operands + self.results

    def block(self, factor: str) -> int:
        """The multiple at which the factor may be cut without cutting a block."""
        return max(dim.block for a in self.arrays for dim in a.dims if dim.factor == factor)

    def contracted(self) -> tuple[str, ...]:
        """Factors that no result has: where one is cut, the results are partial sums."""
        kept = {dim.factor for array in self.results for dim in array.dims}
        every = dict.fromkeys(dim.factor for array in self.operands for dim in array.dims)
        return tuple(factor for factor in every if factor not in kept)

    def check(self, operands: Sequence[Any], params: Any) -> None:
        """Raises ValueError or TypeError for operands of one unbatched call that do not fit."""
        for array, operand in zip(self.operands, operands, strict=False):
            wanted = array.allowed(params)
            if operand.dtype not in wanted:
                raise TypeError(
                    f"{self.op}: {array.name} has dtype {operand.dtype}, wanted "
                    + " or ".join(dtype.name for dtype in wanted)
                )
        sizes = self.sizes([operand.shape for operand in operands], batched=False)
        for factor, (least, multiple) in self.limits.items():
            if sizes[factor] < least or sizes[factor] % multiple:
                name = next(a.name for a in self.operands if a.axis(factor, sizes) is not None)
                raise ValueError(
                    f"{self.op}: {name} has {factor} = {sizes[factor]}, wanted at least {least}"
                    + (f" and a multiple of {multiple}" if multiple > 1 else "")
                )

    def sizes(
        self, shapes: Sequence[tuple[int, ...]], batched: bool | None = None
    ) -> dict[str, int]:
        """The length of each factor, from operands' shapes; ValueError where they disagree.

        Whether there is a batch is told by the first operand, or else by `batched`.
        """
        if batched is None:
            batched = len(shapes[0]) == len(self.operands[0].dims)
        sizes: dict[str, int] = {}
        source: dict[str, str] = {}
        for array, shape in zip(self.operands, shapes, strict=False):
            dims = tuple(dim for dim in array.dims if batched or dim.factor != BATCH)
            if len(shape) != len(dims):
                raise ValueError(
                    f"{self.op}: {array.name} has shape {shape}, wanted {len(dims)} dimensions "
                    f"[{' '.join(map(str, dims))}]"
                )
            for dim, length in zip(dims, shape, strict=True):
                if dim.block == 1 and dim.factor not in sizes:
                    sizes[dim.factor], source[dim.factor] = length, array.name
            if array.shape(sizes) != shape:
                known = ", ".join(
                    f"{dim.factor} = {sizes[dim.factor]} of {source[dim.factor]}" for dim in dims
                )
                raise ValueError(
                    f"{self.op}: {array.name} has shape {shape}, wanted {array.shape(sizes)}, "
                    f"which is [{' '.join(map(str, dims))}] with {known}"
                )
        return sizes
