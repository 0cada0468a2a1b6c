"""A linear layer, dense or grouped, with its gradient."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from .._core import compat
from .products import KEPT, Groups, Products


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(
    products: Products,
    x: jax.Array,
    w: jax.Array,
    of: Groups | None,
    main_grad: jax.Array | None,
) -> jax.Array:
    rows, _ = products.operands(x, of, products.recipe.forward, "bf16")
    return products.times(rows, w, of)


def _forward(products, x, w, of, main_grad):
    recipe = products.recipe
    rows, summed = products.operands(x, of, recipe.forward, recipe.wgrad)
    summed = checkpoint_name(summed, KEPT)
    # The weight is kept as it is, which takes no memory, and is quantised once more for dgrad.
    return products.times(rows, w, of), (summed, w, of, main_grad)


def _backward(products, residuals, dy):
    recipe = products.recipe
    x, w, of, main_grad = residuals
    rows, summed = products.operands(dy, of, recipe.dgrad, recipe.wgrad)
    dx = products.times(rows, w, of, transposed=True)
    dw, d_main_grad = products.sum(x, summed, of, w, main_grad)
    return compat.divided_as(dx, products.input), dw, None, d_main_grad


linear.defvjp(_forward, _backward)
