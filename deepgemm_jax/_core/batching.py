"""How `vmap` turns a batch of calls into one call, from the op's signature alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .signature import BATCH, Array, Signature

Batched = Sequence[tuple[Array, Any, int | None]]  # operands and where each has its batch dim


class Batcher:
    """Batches calls of one op.

    The batch is merged into the first factor of `fold` that allows it: rows of A that share B are
    just more rows. Otherwise every operand gets the batch dim ``...``, or a longer one.
    """

    def __init__(self, signature: Signature, fold: Sequence[str]):
        self.signature = signature
        self.factors = (*fold, BATCH)

    def __call__(
        self,
        call: Callable[[Sequence[Any]], Sequence[Any]],
        operands: Sequence[Any],
        batch_dims: Sequence[int | None],
    ) -> tuple[list[Any], list[int]]:
        """The results of `call` on every element of the batch, and where each has its batch dim."""
        batched: Batched = list(zip(self.signature.operands, operands, batch_dims, strict=False))
        batch = next(x.shape[dim] for _, x, dim in batched if dim is not None)
        sizes = self.signature.sizes([_without(x.shape, dim) for _, x, dim in batched])
        places = {factor: self._place(factor, sizes, batched) for factor in self.factors}
        factor, place = next(
            ((f, place) for f, place in places.items() if place is not None), (None, None)
        )
        if factor is None:
            raise NotImplementedError(
                f"{self.signature.op}: no vmap over dims {batch_dims} of its operands"
            )
        merged = sizes | {factor: batch * sizes.get(factor, 1)}

        def merge(array, x, dim):
            axis = array.axis(factor, merged)
            if axis is None:
                return x
            if dim is None:
                x, dim = jnp.broadcast_to(x, (batch, *x.shape)), 0
            return jnp.moveaxis(x, dim, axis + place).reshape(array.shape(merged))

        results = call([merge(*item) for item in batched])
        dims = [array.axis(factor, merged) + place for array in self.signature.results]
        shapes = [array.shape(sizes) for array in self.signature.results]
        return [
            x.reshape(*shape[:dim], batch, *shape[dim:])
            for x, shape, dim in zip(results, shapes, dims, strict=True)
        ], dims

    def _place(self, factor: str, sizes: Mapping[str, int], batched: Batched) -> int | None:
        """Whether the batch is merged before (0) or behind (1) the factor; None if neither will do.

        Before it, no data moves if the batch is an array's leading dim. Behind it, the elements
        that a device has of an array whose factor is divided stay together.
        """
        axes = {array.name: array.axis(factor, sizes) for array in self.signature.arrays}
        needed = [array for array, _, dim in batched if dim is not None]
        if any(
            factor not in (d.factor for d in a.dims) for a in (*needed, *self.signature.results)
        ):
            return None
        block = self.signature.block(factor)
        if sizes.get(factor, block) % block:
            return None
        divided = any(
            _without(jax.typeof(x).sharding.spec, dim)[axes[array.name]]
            for array, x, dim in batched
            if axes[array.name] is not None
        )
        batch_divided = any(
            jax.typeof(x).sharding.spec[dim] for _, x, dim in batched if dim is not None
        )
        if not divided:
            return 0
        return None if block > 1 or batch_divided else 1


def _without(items: Sequence[Any], index: int | None) -> tuple[Any, ...]:
    return tuple(item for position, item in enumerate(items) if position != index)
