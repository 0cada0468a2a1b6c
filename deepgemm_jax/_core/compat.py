"""Everything that reaches past JAX's documented API, or differs between the versions supported.

Supported: 0.10.2 and later; seen to work on 0.10.2, 0.11.2 and 0.12.0.1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

LoweringContext = mlir.LoweringRuleContext


def make_primitive(
    name: str,
    *,
    abstract_eval: Callable,
    jvp: Callable,
    batch: Callable,
    lower: dict[str | None, Callable],
) -> Primitive:
    """A primitive with a list of results from its rules; `lower` by platform, None for the rest."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    jitted = jax.jit(primitive.bind, static_argnames="params")

    def impl(*operands, params):
        # Without jit, what is bound would end up here again.
        with jax.disable_jit(False):
            return jitted(*operands, params=params)

    primitive.def_impl(impl)
    primitive.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    for platform, lowering in lower.items():
        mlir.register_lowering(primitive, lowering, platform=platform)
    # Without this, a lowering is not told the mesh, and custom_partitioning, which these lowerings
    # emit, asks for it.
    dispatch.prim_requires_devices_during_lowering.add(primitive)
    return primitive


def make_bilinear(primitive: Primitive, transposes: Sequence[Callable]) -> None:
    """Derivatives for a primitive of one result that is linear in each of its first operands.

    `transposes` has for each of those `(params, dtype, d, *operands)` -> its cotangent, in that
    dtype, for one of the result.
    """

    def jvp(operands, tangents, *, params):
        (d,) = primitive.bind(*operands, params=params)
        slope = ad.Zero(_type(d).to_tangent_aval())
        for i, tangent in enumerate(tangents[: len(transposes)]):
            if type(tangent) is not ad.Zero and jnp.issubdtype(d.dtype, jnp.inexact):
                # A tangent need not vary or be divided as its operand does.
                changed = [*operands[:i], divided_as(tangent, operands[i]), *operands[i + 1 :]]
                part = primitive.bind(*vary_alike(changed), params=params)
                slope = ad.add_tangents(slope, *part)
        return [d], [slope]

    def transpose(cotangents, *operands, params):
        (d,) = cotangents
        found: list[Any] = [None] * len(operands)
        if type(d) is not ad.Zero:
            (i,) = (i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
            aval = operands[i].aval
            x = transposes[i](params, aval.dtype, d, *operands)
            # Of a batch, where the operand is the same for all of it.
            if same := [dim for dim, n in enumerate(aval.shape) if x.shape[dim] != n]:
                x = x.sum(same, keepdims=True)
            found[i] = divided_as(x, aval)
        return found

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


def register_serialization(cls: type) -> None:
    """Lets `jax.export` take a dataclass of arrays alone, which is a pytree, as an argument."""
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"deepgemm_jax.{cls.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
        from_children=lambda _, children: cls(*children),
    )


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes along which an array or its type differs from device to device."""
    return _type(x).manual_axis_type.varying


def vary_alike(operands: Sequence[Any]) -> list[Any]:
    """Casts every operand to vary along each axis that any of them varies along."""
    union = frozenset().union(*map(varying_axes, operands))
    return [
        jax.lax.pcast(x, tuple(missing), to="varying")
        if (missing := sorted(union - varying_axes(x)))
        else x
        for x in operands
    ]


def explicit_axes(mesh: AbstractMesh) -> set[str]:
    """The mesh axes that are part of arrays' types."""
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in axes if kind == AxisType.Explicit}


def divided_as(x: jax.Array, like: Any) -> jax.Array:
    """x, such as a gradient, divided as an array or a type is, if mesh axes are part of types."""
    return _divided(x, _type(like).sharding)


def rows_divided_as(x: jax.Array, like: Any) -> jax.Array:
    """x, of as many rows as another array, with these divided as the other's, and nothing else."""
    return divided(x, typed_mesh(like), PartitionSpec(axes_of(like, 0) or None))


def whole(x: jax.Array, last: int = 1) -> jax.Array:
    """x with all of its last axes on each device, if the mesh's axes are part of its type."""
    spec = _type(x).sharding.spec
    kept = max(0, x.ndim - last)
    return divided(x, typed_mesh(x), PartitionSpec(*spec[:kept]))


def typed_mesh(x: Any) -> AbstractMesh:
    """The mesh that an array or its type is on: an empty one for none."""
    return _type(x).sharding.mesh


def axes_of(x: Any, dim: int) -> tuple[str, ...]:
    """The mesh axes along which a dim of an array is divided, if they are part of its type."""
    entry = _type(x).sharding.spec[dim]
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def divided(x: jax.Array, mesh: AbstractMesh, spec: PartitionSpec) -> jax.Array:
    """x, divided so along axes of the mesh, if they are part of types."""
    # Not where it is so already: it would gather along what axes are not Explicit.
    spec = PartitionSpec(*spec, *[None] * (x.ndim - len(spec)))
    return _divided(x, NamedSharding(mesh, spec))


def partitioned(ctx: LoweringContext, mesh: AbstractMesh) -> bool:
    """Whether XLA is to decide how what is lowered here is divided, given its operands' mesh.

    It does where axes are Auto, and beside them for Explicit axes too.
    """
    axes = ctx.module_context.axis_context
    return (
        isinstance(axes, mlir.ShardingContext)
        and axes.num_devices > 1
        # No array of the program is on a mesh: then none is divided.
        and axes.abstract_mesh is not None
        and not mesh.are_all_axes_explicit
    )


def platforms(ctx: LoweringContext) -> Sequence[str]:
    return ctx.platforms or ctx.module_context.platforms


def each(function: Callable, operands: Any) -> Any:
    """`jax.lax.map` without a loop of one trip: XLA:CPU's compiler may hang at such a one."""
    if len(jax.tree.leaves(operands)[0]) != 1:
        return jax.lax.map(function, operands)
    result = function(jax.tree.map(lambda x: x[0], operands))
    return jax.tree.map(lambda x: x[None], result)


def lower_fun(function: Callable) -> Callable:
    """The lowering of a traceable function that returns a list. It may promote ranks, even in a
    program that may not."""
    return mlir.lower_fun(jax.numpy_rank_promotion("allow")(function), multiple_results=True)


def _divided(x: jax.Array, sharding: Any) -> jax.Array:
    same = not explicit_axes(sharding.mesh) or _type(x).sharding == sharding
    return x if same else jax.sharding.reshard(x, sharding)


def _type(x: Any) -> Any:
    return x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
