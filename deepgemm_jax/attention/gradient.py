"""Logits of the indexer in float, and their gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from .._core import compat
from . import op

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
    return op.mqa_logits(q, kv, kv_scale, weights, start, end, params=params)


def _forward(params, *operands):
    return mqa_logits(params, *operands), operands


def _backward(params, operands, gradient):
    q, kv, weights, *_ = operands
    if params.implementation == "cuda":  # which is said of the forward pass
        params = dataclasses.replace(params, implementation=None)
    dq, dweights = op.mqa_logits_backward_q(*operands, gradient, params=params)
    dkv = op.mqa_logits_backward_kv(*operands, gradient, params=params)
    gradients = [
        compat.divided_as(dx.astype(x.dtype), x)
        for x, dx in ((q, dq), (kv, dkv), (weights, dweights))
    ]
    return *gradients, None, None


mqa_logits.defvjp(_forward, _backward)
