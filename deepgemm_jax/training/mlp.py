"""A gated MLP of groups, with its gradient."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .._core import compat
from ..quantize import per_token_cast_to_fp8, swiglu_quantize
from ..scaled import ScaledArray
from . import reference
from .op import swiglu_backward_transpose
from .products import KEPT, Groups, Operand, Products, Summed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mlp(
    products: Products,
    x: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    of: Groups,
    router_weights: jax.Array | None,
    main_grads: tuple[jax.Array | None, jax.Array | None],
) -> jax.Array:
    rows, _ = products.operands(x, of, products.recipe.forward, "bf16")
    return _up_and_down(products, rows, weights, of, router_weights)[1]


def _up_and_down(products, rows, weights, of, router_weights):
    """What is between the products, gate and up, and the result."""
    h = products.times(rows, weights[0], of)
    y: Operand
    if products.recipe.forward == "fp8":
        y = swiglu_quantize(h, router_weights, implementation=products.implementation)
    else:
        y = reference.swiglu(h, router_weights).astype(jnp.bfloat16)
    return h, products.times(y, weights[1], of)


def _forward(products, x, weights, of, router_weights, main_grads):
    recipe = products.recipe
    rows, summed = products.operands(x, of, recipe.forward, recipe.wgrad)
    h, out = _up_and_down(products, rows, weights, of, router_weights)
    if recipe.wgrad == "fp8":
        h = per_token_cast_to_fp8(h, implementation=products.implementation)
    summed, h = checkpoint_name((summed, h), KEPT)
    return out, (summed, h, weights, of, router_weights, main_grads)


def _backward(products, residuals, d_out):
    recipe = products.recipe
    x, h, (gate_up, down), of, router_weights, main_grads = residuals
    rows, d_out = products.operands(d_out, of, recipe.dgrad, recipe.wgrad)
    dy = products.times(rows, down, of, transposed=True)
    if recipe.dgrad == recipe.wgrad == "fp8":
        rows, *columns, d_router_weights = swiglu_backward_transpose(
            h, dy, of.sizes, router_weights, products.implementation
        )
        dh, y = (Summed(x, d_out.sizes) for x in columns)
    else:
        if isinstance(h, ScaledArray):
            h = h.dequantize(products.dtype)
        dy = compat.of_type(dy, jax.typeof(h).sharding)
        dh, y, terms = reference.swiglu_backward(h, dy, router_weights)
        d_router_weights = terms.sum(-1)
        _, y = products.operands(y.astype(products.dtype), of, "bf16", recipe.wgrad)
        rows, dh = products.operands(dh.astype(h.dtype), of, recipe.dgrad, recipe.wgrad)
    dx = products.times(rows, gate_up, of, transposed=True)
    d_weights, d_main_grads = zip(
        products.sum(x, dh, of, gate_up, main_grads[0]),
        products.sum(y, d_out, of, down, main_grads[1]),
        strict=True,
    )
    dx = compat.of_type(dx, products.sharding)
    if router_weights is None:
        d_router_weights = None
    else:
        d_router_weights = compat.of_type(d_router_weights, jax.typeof(router_weights).sharding)
    return dx, d_weights, None, d_router_weights, d_main_grads


mlp.defvjp(_forward, _backward)
