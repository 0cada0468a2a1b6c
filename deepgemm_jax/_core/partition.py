"""How a call is cut over the devices of a mesh, from the op's signature alone.

A cut says along which mesh axes each factor is divided. Devices then call the op on their own
piece; where a contracted factor is divided, the pieces are partial sums and the op's `combine`
adds them up.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from . import compat
from .signature import BATCH, Array, Signature

Cut = dict[str, tuple[str, ...]]  # factor -> the mesh axes that divide it
Piece = Callable[..., Any]  # (operands of one device, axes of the contraction) -> results


class Partitioner:
    """Cuts calls of one op. Factors in `whole` are never divided."""

    def __init__(self, signature: Signature, whole: Sequence[str]):
        self.signature = signature
        self.whole = frozenset(whole)

    def cut(
        self,
        arrays: Sequence[Array],
        specs: Sequence[PartitionSpec],
        sizes: Mapping[str, int],
        mesh: Mesh | AbstractMesh,
    ) -> Cut:
        """The cut that the arrays' shardings ask for.

        Where they contradict each other the first one wins. A factor that does not divide evenly,
        or would be divided within a scale's block, stays whole.
        """
        cut: Cut = {}
        for array, spec in zip(arrays, specs, strict=True):
            for dim, entry in zip(array.dims_of(sizes), spec, strict=False):
                axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
                used = {axis for taken in cut.values() for axis in taken}
                parts = _parts(axes, mesh)
                if (
                    parts > 1
                    and dim.block == 1
                    and dim.factor not in cut
                    and dim.factor not in self.whole
                    and not used.intersection(axes)
                    and sizes[dim.factor] % (parts * self.signature.block(dim.factor)) == 0
                ):
                    cut[dim.factor] = axes
        return cut

    def specs(
        self, arrays: Sequence[Array], cut: Cut, sizes: Mapping[str, int]
    ) -> tuple[PartitionSpec, ...]:
        return tuple(
            PartitionSpec(*(cut.get(dim.factor) for dim in array.dims_of(sizes)))
            for array in arrays
        )

    def contraction(self, cut: Cut) -> tuple[str, ...]:
        """The mesh axes over which a device's results are partial sums."""
        return tuple(axis for factor in self.signature.contracted() for axis in cut.get(factor, ()))

    def typed(self, avals: Sequence[Any]) -> tuple[AbstractMesh, Cut]:
        """The mesh of the operands' types, and the cut that its Explicit axes ask for."""
        operands = self.signature.operands[: len(avals)]
        sizes = self.signature.sizes([aval.shape for aval in avals])
        shardings = [aval.sharding for aval in avals]
        mesh = next((s.mesh for s in shardings if not s.mesh.empty), shardings[0].mesh)
        return mesh, self.cut(operands, [s.spec for s in shardings], sizes, mesh)

    def explicit(self, piece: Piece, avals: Sequence[Any]) -> Callable:
        """The call as a shard_map over the Explicit axes of the operands' types."""
        operands, results = self.signature.operands[: len(avals)], self.signature.results
        sizes = self.signature.sizes([aval.shape for aval in avals])
        mesh, cut = self.typed(avals)
        specs = [aval.sharding.spec for aval in avals]
        in_specs = self.specs(operands, cut, sizes)
        shard = jax.shard_map(
            lambda *local: piece(local, self.contraction(cut)),
            mesh=mesh,
            in_specs=in_specs,
            out_specs=list(self.specs(results, cut, sizes)),
            axis_names=compat.explicit_axes(mesh),
        )

        def call(*values):
            return shard(
                *(
                    # Not where it would change nothing: on axes that are not Explicit it gathers.
                    x if x_spec == spec else jax.sharding.reshard(x, NamedSharding(mesh, spec))
                    for x, x_spec, spec in zip(values, specs, in_specs, strict=True)
                )
            )

        return call

    def automatic(self, piece: Piece, avals: Sequence[Any]) -> Callable:
        """The call with a rule by which XLA's partitioner cuts it when it has chosen shardings."""
        operands, results = self.signature.operands[: len(avals)], self.signature.results
        sizes = self.signature.sizes([aval.shape for aval in avals])

        def partition(mesh, operand_shapes, result_shapes):
            shardings = [shape.sharding for shape in (*operand_shapes, *result_shapes)]
            cut = self.cut(operands + results, [s.spec for s in shardings], sizes, mesh)

            def shard(arrays):
                return [NamedSharding(mesh, spec) for spec in self.specs(arrays, cut, sizes)]

            def call(*local):
                # On one device there is no mesh, whichever the caller has set.
                with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                    return piece(local, self.contraction(cut))

            return mesh, call, shard(results), tuple(shard(operands))

        call = custom_partitioning(lambda *values: piece(values, ()))
        call.def_partition(partition, **self._rule(operands, sizes))
        return call

    def _rule(self, operands: Sequence[Array], sizes: Mapping[str, int]) -> dict[str, Any]:
        """The signature as def_partition's keyword arguments: an einsum and the kinds of factors.

        A dim and its count of blocks share a factor, which Shardy gives the smaller size, so it
        divides blocks. Where the last block is partial it must leave the factor whole.
        """

        def side(arrays):
            words = (
                " ".join(_word(dim.factor) for dim in array.dims_of(sizes)) for array in arrays
            )
            return ", ".join(words)

        whole = {f for f in sizes if f in self.whole or sizes[f] % self.signature.block(f)}
        return {
            "sharding_rule": f"{side(operands)} -> {side(self.signature.results)}",
            "reduction_factors": tuple(
                f for f in map(_word, self.signature.contracted()) if f not in whole
            ),
            "need_replication_factors": tuple(map(_word, sorted(whole))),
        }


def _word(factor: str) -> str:
    return "batch" if factor == BATCH else factor


def _parts(axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
