"""The gated activation in plain JAX."""

import jax
import jax.numpy as jnp

from ..quantize import per_token_cast_to_fp8, quantize_transpose, swiglu_quantize
from ..scaled import BLOCK, ScaledArray


def swiglu(h: jax.Array, weights: jax.Array | None) -> jax.Array:
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    y = jax.nn.silu(gate) * up
    return y if weights is None else y * weights[:, None]


def swiglu_gradients(
    h: jax.Array, dy: jax.Array, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of h, the result once more, and what sums to the gradient of the weights."""
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    dy = dy.astype(jnp.float32)
    activated, derivative = jax.vjp(jax.nn.silu, gate)
    y = activated * up
    d_weights = dy * y
    if weights is not None:
        y, dy = (x * weights[:, None] for x in (y, dy))
    (d_gate,) = derivative(dy * up)
    return jnp.concatenate([d_gate, dy * activated], axis=-1), y, d_weights


def swiglu_forward(params, h, weights=None):
    y = swiglu_quantize(h, weights, implementation=params.implementation)
    kept = per_token_cast_to_fp8(h, implementation=params.implementation)
    return [y.data, y.scale, kept.data, kept.scale]


def swiglu_backward(params, h, scale, dy, group_sizes, weights=None):
    if h.ndim > 2:
        operands = (h, scale, dy, group_sizes, *(() if weights is None else (weights,)))
        return jax.vmap(lambda *operands: swiglu_backward(params, *operands))(*operands)
    dh, y, d_weights = swiglu_gradients(ScaledArray(h, scale).dequantize(), dy, weights)

    def quantize(x):
        return quantize_transpose(
            x.astype(dy.dtype), group_sizes, implementation=params.implementation
        )

    rows, columns, _ = quantize(dh)
    _, y_columns, _ = quantize(y)
    d_weights = jnp.pad(d_weights, ((0, 0), (0, -d_weights.shape[1] % BLOCK)))
    d_weights = d_weights.reshape(len(h), d_weights.shape[1] // BLOCK, BLOCK).sum(-1)
    of = (rows, columns, y_columns)
    return [*(leaf for x in of for leaf in (x.data, x.scale)), d_weights]
