"""The MoE layer as a module: of flax.nnx, and as a dataclass in equinox's style.

`deepgemm_jax.moe.moe_layer` is a function of its weights, so that a module has only to hold them:

    python examples/moe_modules.py
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deepgemm_jax.moe import MoEParams, moe_layer, route, update_bias

SIZES = {"hidden": 256, "intermediate": 128, "experts": 8}


class NnxMoE(nnx.Module):
    """Weights are `nnx.Param`s; the router's bias, which follows the load, is a variable of its own
    kind, so that optimisers leave it alone."""

    class Bias(nnx.Variable):
        pass

    def __init__(self, *, top_k: int, rngs: nnx.Rngs, recipe="fp8", **sizes):
        params = MoEParams.init(rngs.params(), **sizes)
        self.params = nnx.Param(dataclasses.replace(params, bias=None))
        self.bias = NnxMoE.Bias(params.bias)
        self.top_k = top_k
        self.recipe = recipe

    def __call__(self, x: jax.Array, balance: bool = False) -> jax.Array:
        router = functools.partial(route, top_k=self.top_k, score="sigmoid")
        params = dataclasses.replace(self.params.get_value(), bias=self.bias.get_value())
        tokens = x.reshape(-1, x.shape[-1])
        y, stats = moe_layer(tokens, params, router, recipe=self.recipe)
        if balance:
            self.bias.set_value(update_bias(self.bias.get_value(), stats.load))
        return y.reshape(x.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PytreeMoE:
    """A module that is its own pytree, as equinox has them: `jax.grad` of it is one like it."""

    params: MoEParams
    top_k: int = dataclasses.field(metadata={"static": True})
    recipe: str = dataclasses.field(default="fp8", metadata={"static": True})

    @classmethod
    def init(cls, key: jax.Array, *, top_k: int, **sizes) -> "PytreeMoE":
        return cls(MoEParams.init(key, **sizes), top_k)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The result, and the load, of which `balanced` makes the next module."""
        router = functools.partial(route, top_k=self.top_k, score="sigmoid")
        tokens = x.reshape(-1, x.shape[-1])
        y, stats = moe_layer(tokens, self.params, router, recipe=self.recipe)
        return y.reshape(x.shape), stats.load

    def balanced(self, load: jax.Array) -> "PytreeMoE":
        bias = update_bias(self.params.bias, load)
        return dataclasses.replace(self, params=dataclasses.replace(self.params, bias=bias))


def fit_nnx(x, target, steps, rate):
    model = NnxMoE(top_k=2, rngs=nnx.Rngs(0), **SIZES)

    @nnx.jit
    def step(model, x, target):
        def loss(model):
            return jnp.mean((model(x, balance=True) - target) ** 2)

        value, gradient = nnx.value_and_grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w, dw: w - rate * dw, params, gradient))
        return value

    return [float(step(model, x, target)) for _ in range(steps)]


def fit_pytree(x, target, steps, rate):
    model = PytreeMoE.init(jax.random.key(0), top_k=2, **SIZES)

    @jax.jit
    def step(model, x, target):
        def loss(model):
            y, load = model(x)
            return jnp.mean((y - target) ** 2), load

        (value, load), gradient = jax.value_and_grad(loss, has_aux=True)(model)
        model = jax.tree.map(lambda w, dw: w - rate * dw, model, gradient)
        return model.balanced(load), value

    losses = []
    for _ in range(steps):
        model, value = step(model, x, target)
        losses.append(float(value))
    return losses


def main(steps=20, rate=3.0):
    x, target = jax.random.normal(jax.random.key(1), (2, 4, 16, SIZES["hidden"]))
    losses = {}
    for fit in (fit_nnx, fit_pytree):
        first, *_, last = losses[fit.__name__] = fit(x, target, steps, rate)
        print(f"{fit.__name__}: loss {first:.3f} to {last:.3f}")
    return losses


if __name__ == "__main__":
    main()
