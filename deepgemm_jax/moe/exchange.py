"""Tokens to the shards of the experts, and what these make of them back.

Every strategy is a linear map from the tokens of the devices along a mesh axis to rows on each of
them, and that map's transposed, which adds up what the shards made of a token's copies. So each is
the other's gradient. A token is sent to a shard once, however many of its experts are there.
"""

import dataclasses
import functools
import os
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ..quantize import per_token_cast_to_fp8
from ..scaled import BLOCK, ScaledArray
from .permutation import Permutation, permute, unpermute, vary_alike

# XLA of JAX 0.11 and later takes no slow way between processes unless it is told to.
FALLBACK = "xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback"


class Exchange(Protocol):
    """A strategy's way for the tokens of one call."""

    def spread(self, x: jax.Array) -> jax.Array:
        """[T, ...] of a device as the rows that it sends."""

    def send(self, rows: jax.Array) -> jax.Array:
        """These of each device to [R, ...] of each shard."""

    def send_back(self, rows: jax.Array) -> jax.Array:
        """[R, ...] of each shard to where its tokens came from."""

    def collect(self, rows: Any) -> jax.Array:
        """What was sent back, added up for each token: float32 [T, ...]."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("axis", "shards"))
@dataclasses.dataclass(frozen=True)
class AllGather:
    """Every shard has all tokens. Sums are reduce-scattered: each shard sends a device its part,
    which adds the parts up in float32."""

    axis: str
    shards: int

    def spread(self, x):
        return x

    def send(self, rows):
        return jax.lax.all_gather(rows, self.axis, tiled=True)

    def send_back(self, rows):
        return jax.lax.all_to_all(rows, self.axis, 0, 0, tiled=True)

    def collect(self, rows):
        rows = rows.dequantize() if isinstance(rows, ScaledArray) else rows.astype(jnp.float32)
        return rows.reshape(self.shards, -1, *rows.shape[1:]).sum(0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("plan",), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Each device has room for as many rows on each shard."""

    plan: Permutation
    axis: str

    def spread(self, x):
        return permute(x, self.plan)

    def send(self, rows):
        return jax.lax.all_to_all(rows, self.axis, 0, 0, tiled=True)

    def send_back(self, rows):
        return self.send(rows)

    def collect(self, rows):
        return unpermute(rows, self.plan)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("plan", "starts", "sizes"),
    meta_fields=("axis", "rows"),
)
@dataclasses.dataclass(frozen=True)
class RaggedAllToAll:
    """Rows are sent as they are needed, to a shard that has room for so many from all devices.

    Attributes:
      starts: int32 [from, to], the first row of each device's for each shard.
      sizes: int32 [from, to], how many of them find room there.
    """

    plan: Permutation
    starts: jax.Array
    sizes: jax.Array
    axis: str
    rows: int

    @classmethod
    def of(cls, plan: Permutation, axis: str, rows: int) -> "RaggedAllToAll":
        sizes = jax.lax.all_gather(plan.group_sizes, axis)
        ends = jnp.minimum(jnp.cumsum(sizes, 0), rows)
        fitting = jnp.diff(ends, axis=0, prepend=0)
        return cls(plan, jnp.cumsum(sizes, 1) - sizes, fitting, axis, rows)

    def spread(self, x):
        return permute(x, self.plan)

    def send(self, rows):
        there = jnp.cumsum(self.sizes, 0) - self.sizes
        return self._move(rows, self.rows, self.starts, there, self.sizes)

    def send_back(self, rows):
        there = jnp.cumsum(self.sizes, 0) - self.sizes
        return self._move(rows, len(self.plan.slot), there.T, self.starts.T, self.sizes.T)

    def collect(self, rows):
        return unpermute(rows, self.plan)

    def _move(self, x, rows, source, target, sizes):
        """`sizes[i, j]` rows from `source[i, j]` on device i to `target[i, j]` on device j."""
        result = jnp.zeros_like(x, shape=(rows, *x.shape[1:]))
        me = jax.lax.axis_index(self.axis)
        return jax.lax.platform_dependent(
            *vary_alike(x, result, source, target, sizes, me),
            cpu=functools.partial(_ragged_all_to_all_by_gather, axis=self.axis),
            default=functools.partial(_ragged_all_to_all, axis=self.axis),
        )


def _ragged_all_to_all(x, result, source, target, sizes, me, *, axis):
    return jax.lax.ragged_all_to_all(
        x, result, source[me], sizes[me], target[me], sizes[:, me], axis_name=axis
    )


def _ragged_all_to_all_by_gather(x, result, source, target, sizes, me, *, axis):
    """For XLA's CPU backend, which has no such collective."""
    everyone = jax.lax.all_gather(x, axis, tiled=True)
    row = jnp.arange(len(result))[:, None] - target[None, :, me]
    index = (jnp.arange(len(sizes)) * len(x) + source[:, me])[None] + row
    index = jnp.where((row >= 0) & (row < sizes[None, :, me]), index, -1).max(1)
    index = jnp.where(index < 0, len(everyone), index)
    return jnp.take(everyone, index, axis=0, mode="fill", fill_value=0)


def check_ragged_all_to_all() -> None:
    """NotImplementedError where XLA would refuse, with what to do about it."""
    if (
        jax.process_count() > 1
        and jax.default_backend() == "gpu"
        and jax.version.__version_info__ >= (0, 11)
        and f"{FALLBACK}=true" not in os.environ.get("XLA_FLAGS", "")
    ):
        raise NotImplementedError(
            "moe_layer: XLA has no fast ragged_all_to_all between processes; set "
            f"XLA_FLAGS=--{FALLBACK}=true before JAX starts to have a slow one, or take the "
            "strategy 'all_to_all'"
        )


def exchange(
    strategy: str, axis: str, shards: int, experts: jax.Array, local: int, room: int
) -> Exchange:
    """The way for tokens of these experts [T, k] to shards of `local` experts each.

    `room` is how many tokens of a device find place on a shard.
    """
    if strategy == "all_gather":
        return AllGather(axis, shards)
    shard = jnp.where(experts >= 0, experts // local, shards)
    # A token's later slots for a shard that it goes to already need no row.
    same = shard[:, :, None] == shard[:, None, :]
    first = jnp.argmax(same, axis=-1) == jnp.arange(shard.shape[1])[None]
    shard = jnp.where(first, shard, shards)
    if strategy == "all_to_all":
        return AllToAll(Permutation.of(shard, shards, capacity=room), axis)
    check_ragged_all_to_all()
    rows = len(experts) * min(shard.shape[1], shards)
    return RaggedAllToAll.of(Permutation.of(shard, shards, rows), axis, shards * room)


ALIGNED = 16  # bytes that a thread of a GPU loads at once, at most


def _words(columns: int, itemsize: int) -> int:
    return -(-columns * itemsize // ALIGNED) * ALIGNED // 4


def pack(arrays: Any) -> jax.Array:
    """Arrays [T, n] of any dtypes side by side, as integers, whose bits XLA leaves alone."""

    def words(x):
        width = _words(x.shape[1], x.itemsize) * 4 // x.itemsize
        return jnp.pad(x, ((0, 0), (0, width - x.shape[1]))).view(jnp.int32)

    return jnp.concatenate([words(x) for x in jax.tree.leaves(arrays)], axis=1)


def unpack(rows: jax.Array, arrays: Any) -> Any:
    """Rows of what `pack` made of such arrays, as these."""
    start = 0

    def part(x):
        nonlocal start
        # A view of whole rows costs nothing; of a part of them, XLA would make a copy.
        first = start * 4 // x.itemsize
        start += _words(x.shape[1], x.itemsize)
        return rows.view(x.dtype)[:, first : first + x.shape[1]]

    return jax.tree.map(part, arrays)


def send(way: Exchange, tokens: Any) -> Any:
    """An array, or several in one collective."""
    rows = jax.tree.map(way.spread, tokens)
    return way.send(rows) if isinstance(rows, jax.Array) else unpack(way.send(pack(rows)), rows)


@dataclasses.dataclass(frozen=True)
class Wire:
    """In which dtypes rows go over it; float8_e4m3fn is scaled per token."""

    out: Any
    back: Any
    implementation: str | None

    def send(self, way: Exchange, x: jax.Array) -> jax.Array:
        if self.out == jnp.float8_e4m3fn:
            narrow = per_token_cast_to_fp8(x, implementation=self.implementation)
            return send(way, narrow).dequantize(x.dtype)
        return send(way, x.astype(self.out)).astype(x.dtype)

    def send_back(self, way: Exchange, rows: jax.Array) -> jax.Array:
        if self.back == jnp.float8_e4m3fn:
            narrow, packed = self._cast_and_pack(rows)
            return way.collect(unpack(way.send_back(packed), narrow))
        return way.collect(way.send_back(rows.astype(self.back)))

    def _cast_and_pack(self, x: jax.Array) -> tuple[ScaledArray, jax.Array]:
        """The cast makes room for the scales: `pack` would copy what a kernel wrote."""
        columns = x.shape[1]
        blocks = -(-columns // BLOCK)
        start = _words(columns, 1)
        end = start + _words(blocks, 4)
        # A last column's repeats change no block's scale, and XLA reads rows as fast as without.
        wide = jnp.pad(x, ((0, 0), (0, 4 * end - columns)), mode="edge")
        cast = per_token_cast_to_fp8(wide, implementation=self.implementation)
        scale = cast.scale[:, :blocks]
        packed = jax.lax.dynamic_update_slice(cast.data.view(jnp.int32), pack(scale), (0, start))
        return ScaledArray(cast.data[:, :columns], scale), packed


def to_shards(way: Exchange, x: Any, wire: Wire) -> Any:
    """Tokens [T, H] as rows on each shard. The gradient is sent back.

    A `ScaledArray` is sent as it is, with no gradient: the cast that made it has none.
    """
    if isinstance(x, ScaledArray):
        # As words, which `permute` takes FP8 for again: so no view is left of a part of the rows.
        return jax.tree.map(unpack, send(way, jax.tree.map(pack, x)), x)
    return _out(wire, *vary_alike(way, x))


def choices_to_shards(
    way: Exchange, experts: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens' experts and weights [T, k] as rows on each shard. The weights' gradient is sent back.

    They go ahead of the tokens, so that a shard sorts by them while it waits for these.
    """
    return _choices(*vary_alike(way, experts, weights))


def from_shards(way: Exchange, rows: jax.Array, wire: Wire) -> jax.Array:
    """What the shards made of rows, added up for each token: float32. The gradient is sent out."""
    return _back(wire, *vary_alike(way, rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _out(wire, way, x):
    return wire.send(way, x)


@jax.custom_vjp
def _choices(way, experts, weights):
    return send(way, (experts, weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _back(wire, way, rows):
    return wire.send_back(way, rows)


# What is kept of rows is their dtype, in none of them.
_out.defvjp(
    lambda wire, way, x: (wire.send(way, x), way),
    lambda wire, way, d: (None, wire.send_back(way, d).astype(d.dtype)),
)
_choices.defvjp(
    lambda way, *choices: (send(way, choices), way),
    lambda way, d: (None, None, way.collect(way.send_back(d[1])).astype(d[1].dtype)),
)
_back.defvjp(
    lambda wire, way, rows: (wire.send_back(way, rows), (way, rows[:0])),
    lambda wire, kept, d: (None, wire.send(kept[0], d.astype(kept[1].dtype))),
)
