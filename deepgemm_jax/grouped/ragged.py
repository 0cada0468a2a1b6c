"""`jax.lax.ragged_dot` and `ragged_dot_general`, by way of the grouped GEMMs.

Whatever its dims, a ragged dot is one of two products of matrices, batched by `vmap`: rows of
groups by a matrix each, or the rows of each group by each other.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from .._core import compat, sums
from .._core.op import check_implementation
from ..gemm.config import ELEMENTS
from ..scaled import BLOCK, ScaledArray, unpack
from . import groups, op, reference
from .op import PlainParams

Operand = Any  # an array, ScaledArray or tuple of data and scale

_BASIC = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))


def ragged_dot(
    lhs: Operand,
    rhs: Operand,
    group_sizes: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: Any = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies each row by its group's matrix; takes the arguments of `jax.lax.ragged_dot`.

    $$D_{mn} = \sum_{k} L_{mk} R_{g - o, kn}, \qquad g = \text{group of row } m,
    \; o = \text{group_offset}$$

    Args:
      lhs: [M, K], an array of any dtype, or a `ScaledArray` or tuple of data and scale.
      rhs: [G, K, N], likewise.
      group_sizes: integers [G], the rows of each group; groups follow each other from the first row
        on. A negative size counts as 0. Where they add up to less than M, the last rows are in no
        group; where to more, the groups end with the rows.
      precision: of the product of arrays, as `jax.lax.dot` takes it.
      preferred_element_type: the result's dtype. None is what `jax.lax.dot` would return for
        arrays, and bfloat16 for two scaled ones.
      group_offset: an integer, [1] or scalar: the group that the first matrix of `rhs` belongs to.
        With it `rhs` may have fewer groups than `group_sizes`, those of one shard of the experts;
        rows of other groups are zero, so that the sum over the shards is the whole.
      out_sharding: how the result is divided along a mesh's Explicit axes, as
        `jax.sharding.reshard` takes it; None leaves it as the operands have it.
      implementation: "cuda" for the kernel, "xla" for plain JAX, None for the kernel where there
        is one and plain JAX elsewhere.

    Float8 data scaled as `m_grouped_fp8_gemm_nn_contiguous` takes them are multiplied as it does.
    Other scales are multiplied in first: in float32, or in the dtype of an operand without scale
    if that is floating and has 16 bits or more.

    Returns:
      D, [M, N]. Rows of no group are zero.

    Raises:
      TypeError, ValueError: what does not fit.
      NotImplementedError: `implementation="cuda"` where there is no kernel; a derivative is asked
        for of float8 data with their scales.

    For arrays there are derivatives of any order, in both modes, themselves made of grouped
    products. Under `jax.vmap` a batch of `lhs` is one call with more rows, any other one with
    more groups. M, N and K may be divided on a mesh.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ragged_dot
        >>> lhs, rhs = jnp.ones((5, 2)), jnp.arange(6.0).reshape(3, 2, 1)
        >>> print(ragged_dot(lhs, rhs, jnp.array([2, 0, 2]))[:, 0])
        [1. 1. 9. 9. 0.]
        >>> print(ragged_dot(lhs, rhs[2:], jnp.array([2, 0, 2]), group_offset=2)[:, 0])
        [0. 0. 9. 9. 0.]
    """
    d = _ragged_dot_general(
        "ragged_dot",
        lhs,
        rhs,
        group_sizes,
        _BASIC,
        precision,
        preferred_element_type,
        group_offset,
        implementation,
    )
    return _divided("ragged_dot", d, out_sharding)


def ragged_dot_general(
    lhs: Operand,
    rhs: Operand,
    group_sizes: Any,
    ragged_dot_dimension_numbers: RaggedDotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: Any = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    r"""A ragged dot over any dims; takes `jax.lax.ragged_dot_general`'s arguments.

    With b batch dims, x dims outer to the ragged one, and g groups, by the kind of the ragged dim:

    1. not contracted: `[b..., m..., k...], [g, b..., k..., n...], [b..., x..., g] ->
       [b..., m..., n...]`: rows times the matrix of their group;
    2. contracted: `[b..., m..., k...], [b..., k..., n...], [b..., x..., g] ->
       [g, b..., m..., n...]`: a product for each group, over the group's part of k;
    3. of the batch: `[b..., m..., k...], [b..., k..., n...], [x..., g] -> [b..., m..., n...]`: an
       ordinary batched product, where elements of no group are zero. `jax.lax` computes those too.

    Args:
      lhs: an array, or a `ScaledArray` or tuple of data and scale.
      rhs: likewise.
      group_sizes: integers of the shape above or just [g]; read as `ragged_dot` does.
      ragged_dot_dimension_numbers: which dims are which.
      precision: as `ragged_dot` has it, as what follows but for `group_offset`.
      group_offset: an integer, [1] or scalar. In the first kind the group of the first matrix of
        `rhs`, as `ragged_dot` has it; in the others the first group that is computed, where results
        of groups before it are zero.

    Float8 data of two dims, with scales as `m_grouped_fp8_gemm_{nn,nt}_contiguous` and
    `k_grouped_fp8_gemm_{tn,nt}_contiguous` take them, are multiplied as those do.

    Returns, raises and transforms as `ragged_dot` does.

    Example:

        >>> import jax.numpy as jnp
        >>> from jax.lax import RaggedDotDimensionNumbers
        >>> from deepgemm_jax import ragged_dot_general
        >>> x = jnp.arange(4.0).reshape(4, 1)
        >>> dims = RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
        >>> print(ragged_dot_general(x, x, jnp.array([2, 0, 2]), dims)[:, 0, 0])
        [ 1.  0. 13.]
    """
    d = _ragged_dot_general(
        "ragged_dot_general",
        lhs,
        rhs,
        group_sizes,
        ragged_dot_dimension_numbers,
        precision,
        preferred_element_type,
        group_offset,
        implementation,
    )
    return _divided("ragged_dot_general", d, out_sharding)


@dataclasses.dataclass(frozen=True)
class _Dims:
    """A ragged dot's dims by their roles."""

    l_contract: tuple[int, ...]
    r_contract: tuple[int, ...]
    l_batch: tuple[int, ...]
    r_batch: tuple[int, ...]
    l_kept: tuple[int, ...]
    r_kept: tuple[int, ...]
    ragged: int
    group: tuple[int, ...]

    @classmethod
    def of(cls, numbers: RaggedDotDimensionNumbers, l_ndim: int, r_ndim: int) -> "_Dims":
        contract, batch = numbers.dot_dimension_numbers
        l_contract, r_contract, l_batch, r_batch = map(tuple, (*contract, *batch))
        group = tuple(numbers.rhs_group_dimensions)
        return cls(
            l_contract,
            r_contract,
            l_batch,
            r_batch,
            tuple(i for i in range(l_ndim) if i not in (*l_contract, *l_batch)),
            tuple(i for i in range(r_ndim) if i not in (*r_contract, *r_batch, *group)),
            numbers.lhs_ragged_dimensions[0],
            group,
        )

    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The dims of `lhs` of the ragged one's kind that are outer and inner to it."""
        kinds = (self.l_kept, self.l_contract, self.l_batch)
        kind = next(dims for dims in kinds if self.ragged in dims)
        place = kind.index(self.ragged)
        return kind[:place], kind[place + 1 :]


def _ragged_dot_general(
    name: str,
    lhs: Operand,
    rhs: Operand,
    group_sizes: Any,
    numbers: RaggedDotDimensionNumbers,
    precision: Any,
    preferred_element_type: Any,
    group_offset: Any,
    implementation: str | None,
) -> jax.Array:
    check_implementation(name, implementation)
    group_sizes = compat.whole(jnp.asarray(group_sizes))
    if group_offset is not None:
        group_offset = groups.offset(name, group_offset)
    lhs, rhs = (
        _scaled(name, which, x) if isinstance(x, (ScaledArray, tuple)) else jnp.asarray(x)
        for which, x in (("lhs", lhs), ("rhs", rhs))
    )
    scaled = [isinstance(x, ScaledArray) for x in (lhs, rhs)]
    if preferred_element_type is None and all(scaled):
        preferred_element_type = jnp.bfloat16
    dtypes = [
        _wide(other) if is_scaled else x.dtype
        for x, other, is_scaled in zip((lhs, rhs), (rhs, lhs), scaled, strict=True)
    ]
    result = _check(
        name,
        [jax.ShapeDtypeStruct(x.shape, d) for x, d in zip((lhs, rhs), dtypes, strict=True)],
        group_sizes,
        numbers,
        precision,
        preferred_element_type,
        sharded=group_offset is not None,
    )
    dims = _Dims.of(numbers, len(lhs.shape), len(rhs.shape))
    groups.report_sizes(name, group_sizes, lhs.shape[dims.ragged])
    if group_offset is not None:
        most = group_sizes.shape[-1] - sum(rhs.shape[i] for i in dims.group)
        offset = sums.clamp(group_offset, most + 1, least=-1)
        groups.report(name, f"group_offset outside of 0 to {most}", (offset < 0) | (offset > most))
    first, last = _spans(dims, lhs.shape, rhs.shape, group_sizes, group_offset)
    if all(scaled) and (call := _scaled_call(dims, lhs, rhs)):
        which, operands = call
        dtype = result.dtype if result.dtype in (jnp.bfloat16, jnp.float32) else jnp.float32
        d = which(*operands, first, last, params=op.GroupedParams(implementation, dtype))
        return d.astype(result.dtype)

    lhs, rhs = (
        x.dequantize(dtype) if isinstance(x, ScaledArray) else x
        for x, dtype in zip((lhs, rhs), dtypes, strict=True)
    )
    params = PlainParams(implementation, result.dtype, lhs.dtype, rhs.dtype, precision)
    if dims.ragged in dims.l_kept:
        return _rows(dims, params, lhs, rhs, first, last).reshape(result.shape)
    if dims.ragged in dims.l_contract:
        return _sums(dims, params, lhs, rhs, first, last).reshape(result.shape)
    if implementation == "cuda":
        raise NotImplementedError(f"{name} has no kernel for a ragged batch")
    counted = _counted(first, last, lhs.shape[dims.ragged])
    lhs, rhs = (
        jnp.where(_along(counted, batch, x.shape), x, jnp.zeros((), x.dtype))
        for x, batch in ((lhs, dims.l_batch), (rhs, dims.r_batch))
    )
    return jax.lax.dot_general(
        lhs, rhs, numbers.dot_dimension_numbers, precision, preferred_element_type
    )


def _scaled(name: str, which: str, x: Any) -> ScaledArray:
    """The operand, if its scales fit its data."""
    scaled = ScaledArray(*unpack(name, which, x))
    try:
        _ = scaled.recipe
    except ValueError as error:
        raise ValueError(str(error).replace("ScaledArray: ", f"{name}: {which}.", 1)) from error
    return scaled


def _wide(other: jax.Array | ScaledArray) -> jnp.dtype:
    """What a scaled operand becomes where no kernel takes its scales."""
    plain = not isinstance(other, ScaledArray) and jnp.issubdtype(other.dtype, jnp.floating)
    return other.dtype if plain and other.dtype.itemsize >= 2 else jnp.dtype(jnp.float32)


def _divided(
    name: str, d: jax.Array, out_sharding: NamedSharding | PartitionSpec | None
) -> jax.Array:
    if out_sharding is None:
        return d
    try:
        return jax.sharding.reshard(d, out_sharding)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: out_sharding is {out_sharding}: {error}") from error


def _check(
    name: str,
    operands: Sequence[jax.ShapeDtypeStruct],
    group_sizes: jax.Array,
    numbers: RaggedDotDimensionNumbers,
    precision: Any,
    preferred_element_type: Any,
    sharded: bool,
) -> jax.ShapeDtypeStruct:
    """The result's type as jax.lax has it; TypeError or ValueError for what it does not take."""
    lhs, rhs = operands
    sizes = list(group_sizes.shape)
    if sharded and sizes and (group := numbers.rhs_group_dimensions):
        groups.check_shard(name, "rhs", rhs.shape[group[0]], sizes[-1])
        sizes[-1] = rhs.shape[group[0]]
    try:
        # Of types alone, on no mesh, for jax.lax wants to be told the sharding on some.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return jax.eval_shape(
                functools.partial(
                    jax.lax.ragged_dot_general,
                    ragged_dot_dimension_numbers=numbers,
                    precision=precision,
                    preferred_element_type=preferred_element_type,
                ),
                lhs,
                rhs,
                jax.ShapeDtypeStruct(tuple(sizes), group_sizes.dtype),
            )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _spans(
    dims: _Dims,
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    group_sizes: jax.Array,
    group_offset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """First and end of each group along the ragged dim, for each of the dims outer to it."""
    outer, _ = dims.around()
    outside = outer if dims.ragged in dims.l_batch else (*dims.l_batch, *outer)
    shape = (*(lhs_shape[i] for i in outside), group_sizes.shape[-1])
    rows = lhs_shape[dims.ragged]
    first, last = sums.spans(jnp.broadcast_to(group_sizes, shape), rows)
    if group_offset is None:
        return first, last
    if dims.group:
        return groups.shard(first, last, rows, group_offset, rhs_shape[dims.group[0]])
    before = jnp.arange(shape[-1]) < sums.clamp(group_offset, shape[-1])
    return jnp.where(before, last, first), last


def _counted(first: jax.Array, last: jax.Array, rows: int) -> jax.Array:
    """Which rows [..., rows] belong to a group."""
    function: Callable = functools.partial(groups.ids, rows=rows)
    for _ in range(first.ndim - 1):
        function = jax.vmap(function)
    return function(first, last) != groups.PADDING


def _along(x: jax.Array, dims: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """x, whose dims are the first ones of those, repeated along the others of this shape."""
    dims = dims[: x.ndim]
    order = sorted(range(x.ndim), key=lambda i: dims[i])
    return jax.lax.broadcast_in_dim(x.transpose(order), shape, sorted(dims))


def _scaled_call(dims: _Dims, lhs: ScaledArray, rhs: ScaledArray) -> tuple[Callable, list] | None:
    """The op that takes these scales as they are, if there is one, and its operands."""
    for x in lhs, rhs:
        if x.data.dtype not in ELEMENTS[:2] or x.scale.dtype != jnp.float32:
            return None
    if dims.l_batch or len(lhs.shape) != 2 or len(dims.r_kept) != 1:
        return None
    pairs = (lhs.data, lhs.scale), (rhs.data, rhs.scale)
    contract: tuple = dims.l_contract, dims.r_contract
    m, n, k = lhs.shape[dims.l_kept[0]], rhs.shape[dims.r_kept[0]], lhs.shape[dims.l_contract[0]]
    if dims.group == (0,) and dims.ragged == 0 and n >= 16 and k and k % 16 == 0:
        by_scales, b_mn_major = {
            ((1,), (1,)): (op.m_grouped_fp8_gemm_nn_contiguous, True),
            ((1,), (2,)): (op.m_grouped_fp8_gemm_nt_contiguous, False),
        }.get(contract, (None, False))
        if by_scales is None:
            return None
        try:
            scales, operands = op.by_recipe("ragged_dot", *pairs, b_mn_major=b_mn_major)
        except ValueError:
            return None
        return by_scales[scales].in_order, operands
    if not dims.group and m and n and m % 16 == n % 16 == 0:
        which, axis = {
            ((0,), (0,)): (op.k_grouped_fp8_gemm_tn_contiguous, 0),
            ((1,), (1,)): (op.k_grouped_fp8_gemm_nt_contiguous, 1),
        }.get(contract, (None, 0))

        def fits(x: ScaledArray) -> bool:
            wanted = list(x.shape)
            wanted[axis] = -(-k // BLOCK)
            return x.scale.shape == tuple(wanted)

        if which is not None and fits(lhs) and fits(rhs):
            return which, [*pairs[0], *pairs[1]]
    return None


def _matrices(x: jax.Array, *roles: Sequence[int], separate: Sequence[int]) -> jax.Array:
    """Its dims in the order of their roles, those of one role become one, but for the first."""
    order = [*separate, *(dim for role in roles for dim in role)]
    sizes = [math.prod(x.shape[dim] for dim in role) for role in roles]
    return x.transpose(order).reshape([*(x.shape[dim] for dim in separate), *sizes])


def _rows(dims, params, lhs, rhs, first, last):
    """The first kind: [b..., x..., m, k], [b..., g, k, n] -> [b..., x..., m, n]."""
    outer, inner = dims.around()
    inside = math.prod(lhs.shape[i] for i in inner)
    lhs = _matrices(lhs, (dims.ragged, *inner), dims.l_contract, separate=(*dims.l_batch, *outer))
    # As its memory has it, to save a transposition.
    transposed = max(dims.r_kept, default=-1) < min(dims.r_contract, default=-1)
    matrix = (dims.r_kept, dims.r_contract) if transposed else (dims.r_contract, dims.r_kept)
    rhs = _matrices(rhs, dims.group, *matrix, separate=dims.r_batch)
    which = op.ragged_nt if transposed else op.ragged_nn
    function = functools.partial(which.in_order, params=params)
    for _ in outer:
        function = jax.vmap(function, (0, None, 0, 0))
    for _ in dims.l_batch:
        function = jax.vmap(function)
    return function(lhs, rhs, first * inside, last * inside)


def _sums(dims, params, lhs, rhs, first, last):
    """The second kind: [b..., x..., k, m], [b..., x..., k, n] -> [g, b..., m, n]."""
    outer, inner = dims.around()
    inside = math.prod(lhs.shape[i] for i in inner)
    paired = dict(zip(dims.l_contract, dims.r_contract, strict=True))
    lhs = _matrices(lhs, (dims.ragged, *inner), dims.l_kept, separate=(*dims.l_batch, *outer))
    rhs = _matrices(
        rhs,
        [paired[dim] for dim in (dims.ragged, *inner)],
        dims.r_kept,
        separate=(*dims.r_batch, *(paired[dim] for dim in outer)),
    )
    dtype = params.preferred_element_type
    if outer:
        wide = reference.accumulator(dtype, lhs.dtype, rhs.dtype)
        params = dataclasses.replace(params, preferred_element_type=wide)
    function = functools.partial(op.ragged_contracting, params=params)
    for _ in (*outer, *dims.l_batch):
        function = jax.vmap(function)
    d = function(lhs, rhs, first * inside, last * inside)
    batch = len(dims.l_batch)
    d = d.sum(range(batch, batch + len(outer))).astype(dtype)
    return jnp.moveaxis(d, batch, 0)
