"""Arrays in eight bits with the scales that give them their range."""

import dataclasses
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledArray:
    """An array as `data` times `scale`, where one scale serves a block of `data`.

    Along each dim a scale has one entry an element, one for every 128 elements (the last block may
    be partial), or one for all. A pytree: it passes through `jax.jit`, `jax.vmap` and the like.
    Wherever one is taken, the tuple `(data, scale)` is too.

    Example:

        >>> x = ScaledArray(jnp.ones((2, 256), jnp.float8_e4m3fn), jnp.full((2, 2), 0.5))
        >>> x
        ScaledArray(float8_e4m3fn[2,256], scale=float32[2,2])
        >>> float(x.dequantize().sum())
        256.0
    """

    data: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.data.dtype

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """`data` times `scale`, element by element, computed in float32."""
        data, scale = jnp.asarray(self.data), jnp.asarray(self.scale)
        shapes = f"ScaledArray: scale has shape {scale.shape} for data of shape {data.shape}"
        if scale.ndim != data.ndim:
            raise ValueError(f"{shapes}, wanted {data.ndim} dimensions")
        for axis, (length, entries) in enumerate(zip(data.shape, scale.shape, strict=True)):
            if entries in (1, length):
                continue
            if entries != -(-length // BLOCK):
                raise ValueError(
                    f"{shapes}, wanted {length}, {-(-length // BLOCK)} or 1 along axis {axis}"
                )
            scale = jax.lax.slice_in_dim(jnp.repeat(scale, BLOCK, axis), 0, length, axis=axis)
        return (data.astype(jnp.float32) * scale).astype(dtype)

    def __repr__(self) -> str:
        return f"ScaledArray({_brief(self.data)}, scale={_brief(self.scale)})"


jax.export.register_pytree_node_serialization(
    ScaledArray,
    serialized_name="deepgemm_jax.ScaledArray",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: None,
    from_children=lambda _, children: ScaledArray(*children),
)


def unpack(op: str, name: str, x: Any) -> tuple[jax.Array, jax.Array]:
    """Data and scale of an operand; TypeError for what is neither ScaledArray nor a pair."""
    if isinstance(x, ScaledArray):
        x = (x.data, x.scale)
    if not isinstance(x, tuple) or len(x) != 2:
        raise TypeError(
            f"{op}: {name} is {_brief(x)}, wanted a ScaledArray or a tuple (data, scale)"
        )
    data, scale = x
    return jnp.asarray(data), jnp.asarray(scale)


def _brief(x: Any) -> str:
    """As jaxtyping writes a shape; what is no array, as a pytree may hold for a while, as it is."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return repr(x)
