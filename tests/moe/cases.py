"""A small layer, and what it must give: every expert for every token, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepgemm_jax.moe import MoEParams, route

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 48, 256, 128, 8, 3

router = functools.partial(route, top_k=TOP_K, score="sigmoid", n_group=4, topk_group=3, scale=2.5)

# What is added to scores of at most 1 decides alone. Groups of experts are of two.
BIASES = {
    "as it comes": np.zeros(EXPERTS),
    "one expert has all": np.where(np.arange(EXPERTS) == 5, 9, 0),
    "two shards have none": np.where(np.arange(EXPERTS) < 4, 9, 0),
}


def problem(shared: int = 0):
    """Tokens, parameters, and what a loss multiplies the result with; NumPy's, which compile
    nothing."""
    rng = np.random.default_rng(0)

    def normal(*shape, fan_in=1):
        return (rng.normal(size=shape) * fan_in**-0.5).astype(np.float32)

    def mlp(width, *batch):
        gate_up = normal(*batch, HIDDEN, 2, width, fan_in=HIDDEN)
        return gate_up, normal(*batch, width, HIDDEN, fan_in=width)

    params = MoEParams(
        normal(HIDDEN, EXPERTS, fan_in=HIDDEN),
        *mlp(INTERMEDIATE, EXPERTS),
        np.zeros(EXPERTS, np.float32),
        *(mlp(shared) if shared else ()),
    )
    return normal(TOKENS, HIDDEN), params, normal(TOKENS, HIDDEN)


def dense(x, params, valid=None):
    def mlp(gate_up, down):
        gate, up = jnp.einsum("th,hgi->gti", x, gate_up)
        return (jax.nn.silu(gate) * up) @ down

    weights, experts = router(x @ params.router, params.bias)
    each = jax.vmap(mlp)(params.w_gate_up, params.w_down)
    chosen = (experts[:, :, None] == jnp.arange(EXPERTS)) * weights[:, :, None]
    y = jnp.einsum("te,eth->th", chosen.sum(1), each)
    if params.shared_down is not None:
        y += mlp(params.shared_gate_up, params.shared_down)
    return y if valid is None else jnp.where(valid[:, None], y, 0)


def value_and_gradients(layer):
    """(x, params, d, ...) -> the result and the gradients of its product with d; jitted."""

    @jax.jit
    def both(x, params, d, *arguments):
        def loss(x, params):
            # Else logits on a GPU are in TF32, and choose other experts here and there.
            with jax.default_matmul_precision("highest"):
                result = layer(x, params, *arguments)
            y = result[0] if isinstance(result, tuple) else result
            return (y * d).sum(), result

        gradients, result = jax.grad(loss, (0, 1), has_aux=True)(x, params)
        return result, gradients

    return both


def error(got, wanted) -> float:
    """Relative, in the Euclidean norm, of all leaves the worst; zero must be zero."""

    def one(got, wanted):
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        assert np.isfinite(got).all()
        norm = np.linalg.norm(wanted)
        return np.linalg.norm(got - wanted) / norm if norm else np.linalg.norm(got)

    return max(jax.tree.leaves(jax.tree.map(one, got, wanted)))
