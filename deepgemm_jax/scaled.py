"""Arrays in eight bits with the scales that give them their range."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._core import compat

BLOCK = 128
PACKED = 4  # scales in an int32

_MANTISSA = 0x7FFFFF  # of a float32
_LEAST_UE8M0 = 1 << 22  # 2⁻¹²⁷, whose exponent is 0 in UE8M0, as float32 has it: a denormal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledArray:
    """An array as `data` times `scale`, where one scale serves a block of `data`.

    Along each dim a scale has one entry an element, one for every 128 elements (the last block may
    be partial), or one for all. Scales are floats, or UE8M0 (eight bits of exponent) of which an
    int32 holds four: those of four neighbouring blocks of 128 along the last dim, the first in the
    lowest byte.

    A pytree: it passes through `jax.jit`, `jax.vmap` and the like, and has the leaves `data` and
    `scale` for `jax.tree.map` and for checkpoints. Wherever one is taken, the tuple `(data, scale)`
    is too.

    Example:

        >>> x = ScaledArray(jnp.ones((2, 256), jnp.float8_e4m3fn), jnp.full((2, 2), 0.5))
        >>> x
        ScaledArray(float8_e4m3fn[2,256], scale=float32[2,2])
        >>> x.recipe
        (1, 128)
        >>> float(x.dequantize().sum())
        256.0
        >>> x[0]
        ScaledArray(float8_e4m3fn[256], scale=float32[2])
    """

    data: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def recipe(self) -> tuple[int, ...]:
        """How many elements along each dim share a scale, as the shapes tell."""
        shape, scale = self.shape, self.scale.shape
        shapes = f"ScaledArray: scale has shape {scale} for data of shape {shape}"
        if len(scale) != len(shape):
            raise ValueError(f"{shapes}, wanted {len(shape)} dimensions")
        recipe = []
        for axis, (length, entries) in enumerate(zip(shape, scale, strict=True)):
            if axis == len(shape) - 1 and self._is_packed():
                if entries != -(-length // (BLOCK * PACKED)):
                    raise ValueError(
                        f"{shapes}, wanted {-(-length // (BLOCK * PACKED))} along axis {axis}, "
                        "an int32 for every four blocks"
                    )
                recipe.append(BLOCK)
            elif entries == length:
                recipe.append(1)
            elif entries == 1:
                recipe.append(length)
            elif entries == -(-length // BLOCK):
                recipe.append(BLOCK)
            else:
                wanted = dict.fromkeys((length, -(-length // BLOCK), 1))
                raise ValueError(
                    f"{shapes}, wanted {' or '.join(map(str, wanted))} along axis {axis}"
                )
        return tuple(recipe)

    def _is_packed(self) -> bool:
        return self.scale.dtype == jnp.int32

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """`data` times `scale`, element by element, computed in float32."""
        recipe = self.recipe
        scale = unpack_ue8m0(self.scale) if self._is_packed() else jnp.asarray(self.scale)
        for axis, (length, block) in enumerate(zip(self.shape, recipe, strict=True)):
            if block == BLOCK:
                scale = jnp.repeat(scale, BLOCK, axis)
                scale = jax.lax.slice_in_dim(scale, 0, length, axis=axis)
        data = jnp.asarray(self.data).astype(jnp.float32)
        return (data * scale.astype(jnp.float32)).astype(dtype)

    def __getitem__(self, index: Any) -> "ScaledArray":
        """The part that integers, slices, an ellipsis or an array of integers choose.

        Along a dim whose scales serve blocks of 128 nothing may be chosen but all of it.
        """
        index = index if isinstance(index, tuple) else (index,)
        # Not by `in` or `count`, which would compare arrays.
        if any(entry is None for entry in index):
            raise IndexError(f"{self!r} has no new dims, index is {index}")
        ellipses = [i for i, entry in enumerate(index) if entry is Ellipsis]
        chosen = len(index) - len(ellipses)
        if len(ellipses) > 1 or chosen > self.ndim:
            raise IndexError(f"{self!r} has {self.ndim} dimensions, index is {index}")
        if sum(getattr(entry, "ndim", 0) > 0 or isinstance(entry, list) for entry in index) > 1:
            raise IndexError(f"{self!r} may be indexed by one array, index is {index}")
        rest = [slice(None)] * (self.ndim - chosen)
        at = ellipses[0] if ellipses else len(index)
        of_data = [*index[:at], *rest, *index[at + 1 :]]
        of_scale = []
        lengths = zip(of_data, self.recipe, self.shape, self.scale.shape, strict=True)
        for axis, (entry, block, length, entries) in enumerate(lengths):
            if block == 1 or (isinstance(entry, slice) and entry == slice(None)):
                of_scale.append(entry)
            elif entries == 1 and not self._is_packed():
                # One scale for all. Of integers as many zeros: where their dim lands depends on
                # where others are.
                sliced = isinstance(entry, slice)
                if not sliced and jnp.asarray(entry).dtype == bool:
                    raise IndexError(
                        f"{self!r} has one scale along axis {axis}: no mask may choose"
                    )
                of_scale.append(slice(None) if sliced else np.zeros(np.shape(entry), int))
            else:
                raise IndexError(
                    f"{self!r} has a scale for every {block} of {length} along axis {axis}: "
                    "only all of it may be chosen"
                )
        return ScaledArray(self.data[tuple(of_data)], self.scale[tuple(of_scale)])

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError(f"{self!r} has no dimensions, and so no length")
        return self.shape[0]

    def __iter__(self) -> Iterator["ScaledArray"]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def from_qwix(cls, x: Any) -> "ScaledArray":
        """The same numbers as a `qwix.QArray` without a zero point.

        ValueError if it has one, or scales for blocks of other lengths than 1, 128 and all of a
        dim.
        """
        if x.zero_point is not None:
            raise ValueError("ScaledArray: the QArray has a zero point")
        result = cls(x.qvalue, x.scale)
        blocks = tuple(n // entries for n, entries in zip(x.shape, x.scale.shape, strict=True))
        if result.recipe != blocks:
            raise ValueError(f"ScaledArray: the QArray has a scale for every {blocks} elements")
        return result

    def to_qwix(self) -> Any:
        """The same numbers as a `qwix.QArray`; packed scales become float32.

        ValueError where a block is partial, which a QArray cannot have. Needs qwix installed.
        """
        from qwix import QArray

        scale = self.scale
        if self._is_packed():
            scale = unpack_ue8m0(scale)[..., : -(-self.shape[-1] // BLOCK)]
        if any(n % block for n, block in zip(self.shape, self.recipe, strict=True)):
            raise ValueError(f"{self!r} has a partial block, and a QArray only whole ones")
        return QArray(self.data, scale)

    def __repr__(self) -> str:
        return f"ScaledArray({_brief(self.data)}, scale={_brief(self.scale)})"


compat.register_serialization(ScaledArray)


def unpack(op: str, name: str, x: Any) -> tuple[jax.Array, jax.Array]:
    """Data and scale of an operand; TypeError for what is neither ScaledArray nor a pair."""
    pair = (x.data, x.scale) if isinstance(x, ScaledArray) else x
    try:
        data, scale = map(jnp.asarray, pair if isinstance(pair, tuple) else ())
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{op}: {name} is {_brief(x)}, wanted a ScaledArray or a tuple (data, scale) of arrays"
        ) from error
    return data, scale


def round_up_to_power_of_two(x: jax.Array) -> jax.Array:
    """The least power of two that is not below x: normal, positive and float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + _MANTISSA) & ~_MANTISSA, jnp.float32)


def pack_ue8m0(scale: jax.Array) -> jax.Array:
    """Scales [..., S], powers of two in float32, as int32 [..., ceil(S / 4)].

    The first of four is the lowest byte; what fills up the last int32 is 0. A scale that is no
    power of two becomes UE8M0's NaN, 255: data that were divided by it would be off.
    """
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    other = ((bits & (_MANTISSA | np.int32(-(2**31)))) != 0) & (bits != _LEAST_UE8M0)
    exponent = jnp.where(other, 255, bits >> 23).astype(jnp.uint8)
    *outer, entries = scale.shape
    exponent = jnp.pad(exponent, [(0, 0)] * len(outer) + [(0, -entries % PACKED)])
    exponent = exponent.reshape(*outer, -(-entries // PACKED), PACKED)
    return jax.lax.bitcast_convert_type(exponent, jnp.int32)


def unpack_ue8m0(packed: jax.Array) -> jax.Array:
    """The float32 [..., 4 S] of int32 [..., S], as `pack_ue8m0` packs them."""
    exponent = jax.lax.bitcast_convert_type(jnp.asarray(packed), jnp.uint8).astype(jnp.int32)
    bits = jnp.where(exponent == 0, _LEAST_UE8M0, exponent << 23)
    scale = jnp.where(exponent == 255, jnp.nan, jax.lax.bitcast_convert_type(bits, jnp.float32))
    return scale.reshape(*packed.shape[:-1], PACKED * packed.shape[-1])


def _brief(x: Any) -> str:
    """As jaxtyping writes a shape; what is no array, as a pytree may hold for a while, as it is."""
    if isinstance(x, ScaledArray):
        return repr(x)
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if isinstance(x, (list, tuple)):
        entries = ", ".join(map(_brief, x))
        return f"[{entries}]" if isinstance(x, list) else f"({entries})"
    return repr(x)
