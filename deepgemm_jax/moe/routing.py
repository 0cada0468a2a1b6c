"""Which experts a token goes to, and with what weights."""

from typing import Any

import jax
import jax.numpy as jnp

from .._core import sums
from .permutation import Permutation


def route(
    logits: Any,
    bias: Any = None,
    *,
    top_k: int,
    score: str = "softmax",
    n_group: int = 1,
    topk_group: int = 1,
    best_of_group: int = 2,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    r"""Chooses experts for each token.

    $$s_{te} = \text{score}(l_t)_e, \qquad
    E_t = \text{the } \text{top_k } e \text{ of greatest } s_{te} + b_e, \qquad
    w_{te} = \text{scale} \cdot s_{te} / \textstyle\sum_{e' \in E_t} s_{te'}$$

    With `n_group` above 1, experts are in groups of neighbours, such as those of one machine, and a
    token chooses among the experts of its `topk_group` best groups alone. A group is as good as its
    `best_of_group` best experts are together.

    DeepSeek-V3 has sigmoid scores, a bias, 8 groups of which 4 are chosen, and a scale of 2.5;
    DeepSeek-V2 has softmax, no bias, and `best_of_group=1`; Qwen3 and Mixtral are as the defaults.

    Args:
      logits: float [T, E].
      bias: None, or float [E], what is added to scores where experts are chosen, and not in their
        weights: see `update_bias`.
      top_k: how many experts a token goes to.
      score: "softmax" or "sigmoid".
      n_group, topk_group, best_of_group: as above.
      normalize: whether the weights of a token are divided by their sum.
      scale: what they are multiplied by.

    Returns:
      The weights, float32 [T, top_k], and the experts, int32 [T, top_k], the best first.

    Raises:
      ValueError: a score that there is not; groups that do not fit the experts, or hold too few;
        shapes other than the above.

    The weights have a gradient with respect to the logits, and none with respect to the bias.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax.moe import route
        >>> weights, experts = route(jnp.log(jnp.array([[1.0, 3.0, 1.0, 2.0]])), top_k=2)
        >>> print(experts, weights.round(1))
        [[1 3]] [[0.6 0.4]]
    """
    logits = jnp.asarray(logits).astype(jnp.float32)
    if logits.ndim != 2:
        raise ValueError(f"route: logits has shape {logits.shape}, wanted [T, E]")
    scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}.get(score)
    if scores is None:
        raise ValueError(f"route: score is {score!r}, wanted 'softmax' or 'sigmoid'")
    tokens, experts = logits.shape
    if not 1 <= topk_group <= n_group or experts % n_group:
        raise ValueError(
            f"route: {topk_group} of {n_group} groups for {experts} experts, wanted groups of "
            "equal size, and no more than there are"
        )
    of_group = experts // n_group
    if not 1 <= top_k <= topk_group * of_group:
        raise ValueError(
            f"route: top_k is {top_k}, wanted 1 to the {topk_group * of_group} of the groups"
        )
    weights = scores(logits)
    choice = jax.lax.stop_gradient(weights)
    if bias is not None:
        bias = jax.lax.stop_gradient(jnp.asarray(bias)).astype(jnp.float32)
        if bias.shape != (experts,):
            raise ValueError(f"route: bias has shape {bias.shape}, wanted ({experts},)")
        choice += bias[None]
    if n_group > 1:
        choice = choice.reshape(tokens, n_group, of_group)
        best, _ = jax.lax.top_k(choice, min(best_of_group, of_group))
        _, chosen = jax.lax.top_k(best.sum(-1), topk_group)
        allowed = (chosen[:, :, None] == jnp.arange(n_group)[None, None]).any(1)
        choice = jnp.where(allowed[..., None], choice, -jnp.inf).reshape(tokens, experts)
    _, ids = jax.lax.top_k(choice, top_k)
    weights = jnp.take_along_axis(weights, ids, axis=-1)
    if normalize:
        # Scores may all be 0 in float32.
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-20)
    return weights * scale, ids.astype(jnp.int32)


def drop_over_capacity(experts: Any, num_experts: int, capacity: int) -> jax.Array:
    """Takes from each expert all but its first `capacity` tokens.

    Args:
      experts: integers [T, k], as `route` gives them; what is out of range is no expert.
      num_experts: how many experts there are.
      capacity: how many tokens an expert may have.

    Returns:
      The same, int32, -1 where a token was taken from its expert.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax.moe import drop_over_capacity
        >>> print(drop_over_capacity(jnp.array([[0], [1], [0], [0]]), 2, capacity=2).ravel())
        [ 0  1  0 -1]
    """
    plan = Permutation.of(experts, num_experts, capacity=capacity)
    return jnp.where(plan.row < num_experts * capacity, jnp.asarray(experts, jnp.int32), -1)


def expert_load(experts: Any, num_experts: int) -> jax.Array:
    """How many tokens each expert has: int32 [num_experts], of experts [..., k].

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax.moe import expert_load
        >>> print(expert_load(jnp.array([[0, 2], [2, 1], [2, -1]]), 4))
        [1 1 3 0]
    """
    experts = jnp.asarray(experts)
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        raise TypeError(f"expert_load: experts has dtype {experts.dtype}, wanted integers")
    return sums.sizes_of(experts, num_experts)


def update_bias(bias: Any, load: Any, rate: float = 1e-3) -> jax.Array:
    r"""The router's next bias, which balances experts with no auxiliary loss.

    $$b_e \leftarrow b_e + \text{rate} \cdot \text{sign}(\bar n - n_e)$$

    where n is the load of a step, over all devices: what `moe_layer` returns. Both are [E], or
    [..., E] of several layers. Loads are compared in float32; the result has the bias's dtype.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax.moe import update_bias
        >>> print(update_bias(jnp.zeros(3), jnp.array([6, 2, 4]), rate=0.5))
        [-0.5  0.5  0. ]
    """
    bias, load = jnp.asarray(bias), jnp.asarray(load).astype(jnp.float32)
    if load.shape != bias.shape:
        raise ValueError(
            f"update_bias: load has shape {load.shape}, wanted {bias.shape} of the bias"
        )
    above = load.mean(-1, keepdims=True) - load
    return bias + rate * jnp.sign(above).astype(bias.dtype)
