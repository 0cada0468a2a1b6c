"""How a call with batch dims becomes one that the reference and the kernel take.

They take none or, where the op says so, one that all arrays have. It is done when the call is
lowered, on what one device has of it: on a mesh, a batch dim and the rows that it is folded into
may be divided along different axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .signature import Array, Call, Signature


class Batcher:
    """Rids the calls of one op of batch dims.

    A batch dim is folded into the first factor of `fold` that allows it: rows of A that share B are
    just more rows. What no factor takes becomes the batch dim of an op that is `batched`.
    """

    def __init__(self, signature: Signature, fold: Sequence[str], batched: bool):
        self.signature = signature
        self.fold = tuple(fold)
        self.batched = batched

    def targets(self, call: Call) -> list[str | None]:
        """The factor that each batch dim is folded into, None where it stays."""
        targets = [self._target(call, dim) for dim in range(len(call.batch))]
        if None in targets and not self.batched:
            raise NotImplementedError(f"{self.signature.op}: no vmap over these operands")
        return targets

    def _target(self, call: Call, dim: int) -> str | None:
        arrays = zip(call.operands, call.shapes, strict=True)
        varying = [array for array, shape in arrays if shape[dim] != 1]
        for factor in self.fold:
            if (
                all(a.axis(factor) is not None for a in (*varying, *self.signature.results))
                # Else an element's last block would be filled up with the next one's first rows.
                and call.sizes[factor] % self.signature.blocks[factor] == 0
            ):
                return factor
        return None

    def is_plain(self, call: Call) -> bool:
        """Whether the reference and the kernel take the call as it is."""
        if not call.batch:
            return True
        alike = len({shape[: len(call.batch)] for shape in call.shapes}) == 1
        return alike and self.targets(call) == [None]

    def plain(self, function: Callable, call: Call) -> Callable[..., list[Any]]:
        """The call, given its operands, by way of `function`, given those of a plain call."""
        targets = self.targets(call)
        first = 0 if None in targets else 1

        def groups(array: Array) -> list[list[int]]:
            """The dims that become one: those that stay, then each own dim behind its batch dims.

            A batch dim that the array has no factor for has length 1, and is among the first.
            """
            axes = [-1 if target is None else array.axis(target) for target in targets]
            batch = range(len(targets))
            own = range(len(array.dims))
            stay = [dim for dim in batch if axes[dim] in (None, -1)]
            return [stay, *([d for d in batch if axes[d] == i] + [len(batch) + i] for i in own)]

        def merge(array: Array, x: Any) -> Any:
            batch = [
                1 if target and array.axis(target) is None else length
                for target, length in zip(targets, call.batch, strict=True)
            ]
            shape = (*batch, *x.shape[len(batch) :])
            merged = groups(array)
            x = jnp.broadcast_to(x, shape).transpose(sum(merged, []))
            return x.reshape([math.prod(shape[dim] for dim in group) for group in merged[first:]])

        def split(array: Array, y: Any) -> Any:
            shape = (*call.batch, *array.shape(call.sizes))
            order = sum(groups(array), [])
            return y.reshape([shape[dim] for dim in order]).transpose(np.argsort(order))

        def batched(*operands):
            results = function([merge(*item) for item in zip(call.operands, operands, strict=True)])
            return [split(*item) for item in zip(self.signature.results, results, strict=True)]

        return batched
