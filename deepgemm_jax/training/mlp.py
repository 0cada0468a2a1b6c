"""A gated MLP of groups, with its gradient."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .._core import compat
from ..quantize import per_token_cast_to_fp8, swiglu_quantize
from ..scaled import ScaledArray
from . import reference
from .op import swiglu_backward, swiglu_forward
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
    recipe = products.recipe
    rows, _ = products.operands(x, of, recipe.forward, "bf16")
    h = products.times(rows, weights[0], of)
    y, _ = _activate(products, h, router_weights, recipe.forward, "bf16")
    return products.times(y, weights[1], of)


def _activate(
    products: Products, h: jax.Array, router_weights: jax.Array | None, times: str, kept: str
) -> tuple[Operand, Operand]:
    """The activation's result as an operand, and what is kept of h, in these precisions."""
    implementation = products.implementation
    if times == kept == "fp8":
        return swiglu_forward(h, router_weights, implementation)
    y: Operand
    if times == "fp8":
        y = swiglu_quantize(h, router_weights, implementation=implementation)
    else:
        y = reference.swiglu(h, _as_rows(router_weights, h)).astype(jnp.bfloat16)
    return y, per_token_cast_to_fp8(h, implementation=implementation) if kept == "fp8" else h


def _as_rows(router_weights: jax.Array | None, h: jax.Array) -> jax.Array | None:
    """The router's weights, divided as the rows of h are, if mesh axes are part of types."""
    return None if router_weights is None else compat.rows_divided_as(router_weights, h)


def _forward(products, x, weights, of, router_weights, main_grads):
    recipe = products.recipe
    rows, summed = products.operands(x, of, recipe.forward, recipe.wgrad)
    h = products.times(rows, weights[0], of)
    y, h = _activate(products, h, router_weights, recipe.forward, recipe.wgrad)
    out = products.times(y, weights[1], of)
    summed, h = checkpoint_name((summed, h), KEPT)
    return out, (summed, h, weights, of, router_weights, main_grads)


def _gradients(
    products: Products,
    h: Operand,
    dy: jax.Array,
    of: Groups,
    router_weights: jax.Array | None,
    sizes: jax.Array,
) -> tuple[Operand, Summed, Summed, jax.Array | None]:
    """dh as both operands, y as the operand of a sum, whose groups have these sizes in FP8; and
    the gradient of the router's weights."""
    recipe = products.recipe
    if recipe.dgrad == recipe.wgrad == "fp8":
        rows, dh, y, d_weights = swiglu_backward(
            h, dy, of.sizes, router_weights, products.implementation
        )
        operands = rows, Summed(dh, sizes), Summed(y, sizes)
    else:
        h = h.dequantize(products.input.dtype) if isinstance(h, ScaledArray) else h
        dy = compat.divided_as(dy, h)
        d_h, again, terms = reference.swiglu_gradients(h, dy, _as_rows(router_weights, h))
        _, of_y = products.operands(again.astype(products.input.dtype), of, "bf16", recipe.wgrad)
        operands = *products.operands(d_h.astype(h.dtype), of, recipe.dgrad, recipe.wgrad), of_y
        d_weights = terms.sum(-1)
    if router_weights is None:
        return *operands, None
    return *operands, compat.divided_as(d_weights, router_weights)


def _backward(products, residuals, d_out):
    recipe = products.recipe
    x, h, (gate_up, down), of, router_weights, main_grads = residuals
    rows, d_out = products.operands(d_out, of, recipe.dgrad, recipe.wgrad)
    dy = products.times(rows, down, of, transposed=True)
    rows, dh, y, d_router_weights = _gradients(products, h, dy, of, router_weights, d_out.sizes)
    dx = products.times(rows, gate_up, of, transposed=True)
    d_weights, d_main_grads = zip(
        products.sum(x, dh, of, gate_up, main_grads[0]),
        products.sum(y, d_out, of, down, main_grads[1]),
        strict=True,
    )
    dx = compat.divided_as(dx, products.input)
    return dx, d_weights, None, d_router_weights, d_main_grads


mlp.defvjp(_forward, _backward)
