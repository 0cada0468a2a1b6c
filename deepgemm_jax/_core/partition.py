"""How a call is divided among the devices of a mesh, from the op's signature alone.

A cut says along which mesh axes each factor is divided. Each device calls the op on its own piece;
where a contracted factor is divided, the results of the pieces are partial sums.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from . import compat
from .signature import Array, Dim, Signature

Dims = tuple[Dim, ...]
Cut = dict[str, tuple[str, ...]]  # factor -> the mesh axes that divide it
# (operands on one device, mesh axes over which its results are partial sums) -> results
Piece = Callable[[Sequence[Any], tuple[str, ...]], list[Any]]


class Division:
    """The ways to divide the call that has operands of these types.

    A factor stays whole if the op wants that, and if its last block is partial.
    """

    def __init__(
        self, signature: Signature, whole: Collection[str], avals: Sequence[Any], params: Any
    ):
        call = signature.match([aval.shape for aval in avals], params)
        self.signature = signature
        self.types = [aval.sharding for aval in avals]
        self.mesh = next((t.mesh for t in self.types if not t.mesh.empty), self.types[0].mesh)
        self.sizes = dict(call.sizes)

        def dims(array: Array, batch: Sequence[int]) -> Dims:
            # What is the same for all of a batch has a factor of its own, of length 1.
            factors = [f"batch{i}" if n != 1 else f"same{i}" for i, n in enumerate(batch)]
            self.sizes.update(zip(factors, batch, strict=True))
            return (*map(Dim, factors), *array.dims)

        self.operands = [
            dims(array, shape[: len(call.batch)])
            for array, shape in zip(call.operands, call.shapes, strict=True)
        ]
        self.results = [dims(array, call.batch) for array in signature.results]
        self.whole = {f for f in self.sizes if f in whole or self.sizes[f] % self._block(f)}

    def _block(self, factor: str) -> int:
        return self.signature.blocks.get(factor, 1)

    def typed_cut(self) -> Cut:
        """The cut that the operands' types ask for, by their Explicit axes."""
        return self._cut(self.operands, [t.spec for t in self.types], self.mesh)

    def _cut(
        self, arrays: Sequence[Dims], specs: Sequence[PartitionSpec], mesh: Mesh | AbstractMesh
    ) -> Cut:
        """The cut that agrees with the arrays' shardings, the first one's where they disagree.

        A factor is divided into parts of equal length that are whole blocks, or not at all.
        """
        cut: Cut = {}
        for dims, spec in zip(arrays, specs, strict=True):
            for dim, entry in zip(dims, spec, strict=False):
                axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
                parts = math.prod(mesh.shape[axis] for axis in axes)
                taken = {axis for axes in cut.values() for axis in axes}
                if (
                    parts > 1
                    and dim.block == 1
                    and dim.factor not in cut
                    and dim.factor not in self.whole
                    and not taken.intersection(axes)
                    and self.sizes[dim.factor] % (parts * self._block(dim.factor)) == 0
                ):
                    cut[dim.factor] = axes
        return cut

    def specs(self, arrays: Sequence[Dims], cut: Cut) -> list[PartitionSpec]:
        return [PartitionSpec(*(cut.get(dim.factor) for dim in dims)) for dims in arrays]

    def _partial_axes(self, cut: Cut) -> tuple[str, ...]:
        return tuple(axis for factor in self.signature.contracted for axis in cut.get(factor, ()))

    def by_types(self, piece: Piece) -> Callable[..., list[Any]]:
        """The call as a shard_map over the Explicit axes of the operands' types."""
        cut = self.typed_cut()
        in_specs = self.specs(self.operands, cut)
        shard = jax.shard_map(
            lambda *operands: piece(operands, self._partial_axes(cut)),
            mesh=self.mesh,
            in_specs=tuple(in_specs),
            out_specs=self.specs(self.results, cut),
            axis_names=compat.explicit_axes(self.mesh),
        )

        def call(*operands):
            return shard(
                *(
                    # Not where the type is right: it would gather along what axes are not Explicit.
                    # What is on no mesh comes to that of the others.
                    x
                    if type_.spec == spec
                    else jax.sharding.reshard(x, type_.update(mesh=self.mesh, spec=spec))
                    for x, type_, spec in zip(operands, self.types, in_specs, strict=True)
                )
            )

        return call

    def by_compiler(self, piece: Piece) -> Callable[..., list[Any]]:
        """The call for XLA to divide: it is told the rule, and asks for a piece when it has decided
        how the operands and results are sharded."""

        def partition(mesh, operands, results):
            specs = [array.sharding.spec for array in (*operands, *results)]
            cut = self._cut(self.operands + self.results, specs, mesh)

            def shardings(arrays):
                return [NamedSharding(mesh, spec) for spec in self.specs(arrays, cut)]

            def call(*operands):
                # On one device there is no mesh, whichever the caller has set.
                with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                    return piece(operands, self._partial_axes(cut))

            return mesh, call, shardings(self.results), tuple(shardings(self.operands))

        # In the order in which the rule has them, as Shardy wants them.
        arrays = self.operands + self.results
        factors = dict.fromkeys(dim.factor for dims in arrays for dim in dims)
        contracted = set(self.signature.contracted) - self.whole
        call = custom_partitioning(lambda *operands: piece(operands, ()))
        call.def_partition(
            partition,
            # A dim and its number of blocks share a factor. Shardy takes the smaller of their
            # lengths for the factor's, and so divides whole blocks.
            sharding_rule=f"{_einsum(self.operands)} -> {_einsum(self.results)}",
            reduction_factors=tuple(f for f in factors if f in contracted),
            need_replication_factors=tuple(f for f in factors if f in self.whole),
        )
        return call


def _einsum(arrays: Sequence[Dims]) -> str:
    return ", ".join(" ".join(dim.factor for dim in dims) for dims in arrays)
