"""Layers in FP8 that differentiate.

What all of these do alike:

- The gradient quantises what it needs by itself, along the dim that each product contracts. No FP8
  array is ever differentiated: `jax.grad` sees arrays of the dtypes that it was given.
- Until the gradient is computed, activations are kept in FP8, as the gradient of the weight needs
  them. Weights are kept as they are given, and are quantised again. A policy of `jax.checkpoint`
  may keep the activations by their name, "deepgemm_jax.activations".
- `recipe` is "fp8", "bf16" or a `Recipe`, which says it for each product.
- `main_grad` is None, or what the gradient of the weight is added to: float32, of the weight's
  shape. Then *its* gradient is the sum, and that of the weight is zero:
  `jax.grad(loss, argnums=main_grads)` returns the accumulated gradients, which take the memory of
  the main gradients if these are donated. Each may be used once in a loss.
- They work under `jit`, `grad`, `vmap`, `scan`, `jax.checkpoint` and `shard_map`; inside of that,
  the gradient of what is the same on all devices is the sum over them. There is no forward mode.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core import compat, sums
from .._core.op import check_implementation
from ..grouped import groups
from . import linear, mlp
from .products import MULTIPLE, Groups, Products
from .recipe import Recipe

FLOATS = (jnp.bfloat16, jnp.float32)

__all__ = ["Recipe", "fp8_dot", "grouped_linear", "grouped_mlp"]


def fp8_dot(
    x: Any,
    w: Any,
    *,
    recipe: Recipe | str = "fp8",
    main_grad: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies activations by a weight in FP8; its gradient is in FP8, too.

    $$y_{mn} = \sum_k x_{mk} w_{kn}, \qquad dx_{mk} = \sum_n dy_{mn} w_{kn}, \qquad
    dw_{kn} = \sum_m x_{mk} dy_{mn}$$

    Args:
      x: bfloat16 or float32 [..., K].
      w: bfloat16 or float32 [K, N]. A gradient is summed in float32, and is rounded to w's dtype.
      recipe: the precision of each of these products: a `Recipe`, "fp8" or "bf16".
      main_grad: None, or float32 [K, N], what dw is added to: see `deepgemm_jax.training`.
      implementation: "cuda" for the kernels, "xla" for plain JAX, None for kernels where there are
        some and plain JAX elsewhere.

    K and N are multiples of 16.

    Returns:
      y, [..., N] of x's dtype.

    Raises:
      TypeError: an operand is of another dtype.
      ValueError: shapes that do not fit each other or the limits above; a recipe or implementation
        that there is not; a main gradient that is the same on devices, or in a batch, that have
        other gradients each.
      NotImplementedError: `implementation="cuda"` where there is no kernel.

    Example:

        >>> import jax, jax.numpy as jnp
        >>> from deepgemm_jax import fp8_dot
        >>> x, w = jnp.ones((2, 3, 128), jnp.bfloat16), jnp.full((128, 256), 0.5)
        >>> loss, dw = jax.jit(jax.value_and_grad(lambda w: fp8_dot(x, w).sum()))(w)
        >>> print(loss, dw.shape, dw.dtype, dw[0, 0].round())
        98304 (128, 256) float32 6.0
    """
    name = "fp8_dot"
    x = _array(name, "x", x, (None,) * max(1, jnp.ndim(x)))
    w = _weight(name, "w", w, (x.shape[-1], None))
    main_grad = _main_grad(name, main_grad, w)
    # Rows may come in any order. A dim that a mesh divides becomes theirs if it is the first.
    divided = jax.typeof(x).sharding.spec
    order = (*sorted(range(x.ndim - 1), key=lambda i: divided[i] is None), x.ndim - 1)
    x = x.transpose(order)
    rows = x.reshape(-1, x.shape[-1])
    products = _products(name, rows, recipe, implementation)
    rows, w = _vary_alike(name, (rows, w), main_grad)
    y = linear.linear(products, rows, w, None, main_grad)
    return y.reshape(*x.shape[:-1], w.shape[-1]).transpose(np.argsort(order))


def grouped_linear(
    x: Any,
    w: Any,
    group_sizes: Any,
    *,
    recipe: Recipe | str = "fp8",
    group_offset: Any = None,
    main_grad: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies each row by its group's weight in FP8; its gradient is in FP8, too.

    $$y_{mn} = \sum_k x_{mk} w_{gkn}, \qquad dx_{mk} = \sum_n dy_{mn} w_{gkn}, \qquad
    dw_{gkn} = \sum_{m \in \text{group } g} x_{mk} dy_{mn}, \qquad g = \text{group of row } m$$

    Args:
      x: bfloat16 or float32 [M, K]: rows of the first group, then of the second, and so on.
      w: bfloat16 or float32 [G, K, N].
      group_sizes: integers [G], the rows of each group, none aligned to anything. A negative size
        counts as 0. Where they add up to less than M, the last rows are in no group; where to more,
        the groups end with the rows.
      recipe: as `fp8_dot` has it.
      group_offset: None; or an integer, [1] or scalar: the group that the first weight belongs to.
        With it there may be fewer weights than group sizes, those of one shard of the experts; rows
        of other groups are in no group.
      main_grad: None, or float32 [G, K, N], what dw is added to: see `deepgemm_jax.training`.
      implementation: as `fp8_dot` has it.

    K and N are multiples of 16.

    Returns:
      y, [M, N] of x's dtype. Rows of no group are zero, as are their gradients, whatever they hold,
      NaN too. The gradient of the weight of an empty group is zero.

    Raises: as `fp8_dot`.

    Example:

        >>> import jax, jax.numpy as jnp
        >>> from deepgemm_jax import grouped_linear
        >>> x, w, sizes = jnp.ones((5, 128)), jnp.ones((3, 128, 16)), jnp.array([3, 0, 1])
        >>> loss = lambda x, w: grouped_linear(x, w, sizes).sum()
        >>> y, (dx, dw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
        >>> print(y.round(), dx[:, 0].round(), dw[:, 0, 0].round())
        8192.0 [16. 16. 16. 16.  0.] [3. 0. 1.]
    """
    name = "grouped_linear"
    x = _array(name, "x", x, (None, None))
    w = _weight(name, "w", w, (None, x.shape[-1], None))
    main_grad = _main_grad(name, main_grad, w)
    of = _groups(name, x.shape[0], group_sizes, group_offset, w.shape[0])
    products = _products(name, x, recipe, implementation)
    x, w, of = _vary_alike(name, (x, w, of), main_grad)
    if not of.count:
        return _of_no_groups(x, w)
    return linear.linear(products, x, w, of, main_grad)


def grouped_mlp(
    x: Any,
    w_gate_up: Any,
    w_down: Any,
    group_sizes: Any,
    router_weights: Any = None,
    *,
    recipe: Recipe | str = "fp8",
    group_offset: Any = None,
    main_grads: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Puts each row through its group's SwiGLU MLP in FP8; its gradient is in FP8, too.

    $$h = x\, W^{\text{gate up}}_g, \qquad
    y_{mi} = r_m \operatorname{silu}(h_{mi})\, h_{m,I+i}, \qquad
    z = y\, W^{\text{down}}_g, \qquad g = \text{group of row } m$$

    It is one step for `jax.grad`: between the products nothing is kept but h in FP8, from which the
    gradient computes y again, if the `wgrad` of the recipe is in FP8.

    Args:
      x: bfloat16 or float32 [M, K]: rows of the first group, then of the second, and so on.
      w_gate_up: bfloat16 or float32 [G, K, 2 I], the columns of the gates first.
      w_down: bfloat16 or float32 [G, I, N].
      group_sizes: as `grouped_linear` has them.
      router_weights: None, or bfloat16 or float32 [M], r: by what each row is multiplied. It has a
        gradient.
      recipe: as `fp8_dot` has it, for either layer.
      group_offset: as `grouped_linear` has it.
      main_grads: None, or a pair of float32 arrays, what the gradients of the weights are added to:
        see `deepgemm_jax.training`.
      implementation: as `fp8_dot` has it.

    K, I and N are multiples of 16.

    Returns:
      z, [M, N] of x's dtype. Rows of no group are zero, as are their gradients, whatever they hold.

    Raises: as `fp8_dot`.

    Example:

        >>> import jax, jax.numpy as jnp
        >>> from deepgemm_jax import grouped_mlp
        >>> x, sizes = jnp.ones((4, 32)), jnp.array([2, 1])
        >>> gate_up, down = jnp.full((2, 32, 64), 1 / 32), jnp.ones((2, 32, 16))
        >>> router_weights = jnp.array([1.0, 0.5, 2.0, 1.0])
        >>> y = jax.jit(grouped_mlp)(x, gate_up, down, sizes, router_weights)
        >>> print(y[:, 0].round(1))
        [23.4 11.7 46.8  0. ]
    """
    name = "grouped_mlp"
    x = _array(name, "x", x, (None, None))
    w_gate_up = _weight(name, "w_gate_up", w_gate_up, (None, x.shape[-1], None))
    count, _, width = w_gate_up.shape
    if width % (2 * MULTIPLE):
        raise ValueError(f"{name}: w_gate_up has {width} columns, wanted a multiple of 32")
    w_down = _weight(name, "w_down", w_down, (count, width // 2, None))
    weights = w_gate_up, w_down
    if router_weights is not None:
        router_weights = _array(name, "router_weights", router_weights, x.shape[:1])
        router_weights = router_weights.astype(jnp.float32)
    main_grads = (None, None) if main_grads is None else tuple(main_grads)
    if len(main_grads) != 2:
        raise ValueError(f"{name}: main_grads has {len(main_grads)} arrays, wanted a pair")
    main_grads = tuple(map(functools.partial(_main_grad, name), main_grads, weights))
    of = _groups(name, x.shape[0], group_sizes, group_offset, count)
    products = _products(name, x, recipe, implementation)
    operands = _vary_alike(name, (x, weights, of, router_weights), main_grads)
    if not count:
        return _of_no_groups(operands[0], w_down)
    return mlp.mlp(products, *operands, main_grads)


def _of_no_groups(x: jax.Array, w: jax.Array) -> jax.Array:
    """The result where there are no matrices: zeros that vary over a mesh as x does."""
    return compat.vary_alike([jnp.zeros((len(x), w.shape[-1]), x.dtype), x])[0]


def _array(
    name: str, which: str, x: Any, shape: Sequence[int | None], dtypes: Sequence[Any] = FLOATS
) -> jax.Array:
    """The array, if it has one of these dtypes and this shape, where None is any length."""
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: {which} is {x!r}, wanted an array") from None
    if x.dtype not in dtypes:
        wanted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise TypeError(f"{name}: {which} has dtype {x.dtype}, wanted {wanted}")
    fits = zip(x.shape, shape, strict=False)
    if x.ndim != len(shape) or any(wanted not in (None, length) for length, wanted in fits):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name}: {which} has shape {x.shape}, wanted ({wanted})")
    return x


def _weight(name: str, which: str, w: Any, shape: Sequence[int | None]) -> jax.Array:
    w = _array(name, which, w, shape)
    if any(length < MULTIPLE or length % MULTIPLE for length in w.shape[-2:]):
        raise ValueError(
            f"{name}: {which} has shape {w.shape}, wanted multiples of {MULTIPLE} in the last two"
        )
    return w


def _main_grad(name: str, main_grad: Any, w: jax.Array) -> jax.Array | None:
    if main_grad is None:
        return None
    return _array(name, "main gradient", main_grad, w.shape, [jnp.float32])


def _products(
    name: str, x: jax.Array, recipe: Recipe | str, implementation: str | None
) -> Products:
    check_implementation(name, implementation)
    return Products(Recipe.of(name, recipe), jax.typeof(x), implementation)


def _groups(name: str, rows: int, group_sizes: Any, group_offset: Any, count: int) -> Groups:
    wanted = (count,) if group_offset is None else None
    sizes = compat.whole(groups.integers(name, "group_sizes", group_sizes, wanted))
    first = None if group_offset is None else groups.offset(name, group_offset)
    groups.check_shard(name, "the weight", count, len(sizes))
    groups.report_sizes(name, sizes, rows)
    return Groups(sums.clamp(sizes, rows), first, count)


def _vary_alike(name: str, operands: Any, main_grads: Any) -> Any:
    """The operands, made to vary along the same mesh axes.

    Then the gradient of what is the same along one of them comes out as the sum over it. Of a main
    gradient that would be a sum of sums.
    """
    leaves, tree = jax.tree.flatten((operands, main_grads))
    varying = compat.vary_alike(leaves)
    given = jax.tree.leaves(main_grads)
    for before, after in zip(given, varying[len(leaves) - len(given) :], strict=True):
        if same := sorted(compat.varying_axes(after) - compat.varying_axes(before)):
            raise ValueError(
                f"{name}: the main gradient is the same along the mesh axes {same}, what is added "
                "to it is not: let each device have its own, by jax.lax.pcast(..., to='varying'), "
                "and sum them at last"
            )
    return jax.tree.unflatten(tree, varying)[0]
