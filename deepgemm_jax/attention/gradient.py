"""Logits of the indexer in float, and their gradient."""

import functools

import jax
import jax.numpy as jnp

from .._core.compat import vary_alike
from . import op
from .reference import relu

E4M3_MAX = 448.0


def quantize_rows(x):
    """Each row's nearest e4m3, and its scale: [..., d] -> [..., d], [...]."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1)
    # A row of zeros takes any scale; one below the normal numbers would have no inverse.
    scale = jnp.maximum(largest / E4M3_MAX, jnp.finfo(jnp.float32).tiny)
    return (x / scale[..., None]).astype(jnp.float8_e4m3fn), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mqa_logits(params, q, kv, weights, start, end):
    (q, q_scale), (kv, kv_scale) = quantize_rows(q), quantize_rows(kv)
    weights = weights.astype(jnp.float32) * q_scale
    return op.fp8_mqa_logits(q, kv, kv_scale, weights, start, end, params=params)


def _forward(params, *operands):
    return mqa_logits(params, *operands), operands


def _backward(params, residuals, gradient):
    q, kv, weights, start, end = residuals
    keys = jnp.arange(kv.shape[0])
    columns = keys - jnp.maximum(start, 0)[:, None] if params.compressed else keys[None]
    inside = (keys >= start[:, None]) & (keys < end[:, None]) & (columns < params.columns)
    gradient = gradient.astype(jnp.float32)
    if params.compressed:
        gradient = jnp.take_along_axis(gradient, jnp.clip(columns, 0, params.columns - 1), 1)
    gradient = jnp.where(inside, gradient, 0)
    kv_float = kv.astype(jnp.float32)
    precise = functools.partial(jnp.einsum, precision="highest")

    def head(kv_gradient, one):
        """One head at a time, so that memory is needed for a few times the logits."""
        q, weights = (x.astype(jnp.float32) for x in one)
        scores = precise("sd,td->st", q, kv_float)
        weights_gradient = (gradient * relu(scores)).sum(1)
        through = jnp.where(scores > 0, gradient * weights[:, None], 0)
        kv_gradient += precise("st,sd->td", through, q)
        return kv_gradient, (precise("st,td->sd", through, kv_float), weights_gradient)

    start_value, _ = vary_alike([jnp.zeros(kv.shape, jnp.float32), gradient])
    kv_gradient, (q_gradient, weights_gradient) = jax.lax.scan(
        head, start_value, (jnp.moveaxis(q, 1, 0), weights.T)
    )
    return (
        jnp.moveaxis(q_gradient, 0, 1).astype(q.dtype),
        kv_gradient.astype(kv.dtype),
        weights_gradient.T.astype(weights.dtype),
        None,
        None,
    )


mqa_logits.defvjp(_forward, _backward)
