"""Trains a small language model in the style of DeepSeek-V3, once in BF16 and once in FP8.

Mixture-of-experts layers with a shared expert, top-4 routing by sigmoid scores, and balanced loads
without an auxiliary loss: a bias on the scores, which no gradient sees, follows the loads. All of
the layers' matrix products, forward and backward, are the package's. The model is a module of
flax.nnx, optax trains it, and the text is generated.

    python examples/train_moe.py                 on a GPU, in half a minute
    python examples/train_moe.py --size small    on a CPU, in ten minutes
    python examples/train_moe.py --size tiny     in a minute
"""

import argparse
import dataclasses
import datetime
import functools
import json
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deepgemm_jax import fp8_dot
from deepgemm_jax.moe import MoEParams, moe_layer, route, update_bias

VOCABULARY = 256  # bytes


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 4
    width: int = 512
    heads: int = 8
    experts: int = 32
    top_k: int = 4
    expert_width: int = 256
    length: int = 256  # of a text in bytes
    batch: int = 64
    steps: int = 400
    rate: float = 2e-3
    bias_rate: float = 1e-3  # of the balancing


SIZES = {
    "tiny": Config(
        layers=2, width=64, heads=2, experts=16, expert_width=32, length=32, batch=4, steps=20
    ),
    "small": Config(layers=3, width=128, heads=4, experts=16, expert_width=64, length=96, batch=8),
    "full": Config(),
}


def generate_text(characters: int, seed: int = 0) -> str:
    """Sentences whose numbers add up, so that there is something to learn for long."""
    rng = random.Random(seed)
    names = ["Ada", "Emmy", "Grace", "Hedy", "Katherine", "Mary", "Rosalind", "Sofia"]
    things = ["apples", "books", "coins", "lamps", "maps", "pens", "shells", "stones"]
    sentences, length = [], 0
    while length < characters:
        name, other = rng.sample(names, 2)
        thing, a, b = rng.choice(things), rng.randrange(1, 50), rng.randrange(1, 50)
        sentence = rng.choice(
            [
                f"{name} has {a} {thing} and finds {b} more: {name} has {a + b} {thing} now. ",
                f"{name} had {a + b} {thing}, gave {other} {b} of them, and kept {a}. ",
                f"How many {thing} do {name} with {a} and {other} with {b} have? {a + b}. ",
            ]
        )
        sentences.append(sentence)
        length += len(sentence)
    return "".join(sentences)


def batches(config: Config, seed: int = 0) -> np.ndarray:
    """Bytes [steps, batch, length + 1], from random places of the text."""
    text = np.frombuffer(generate_text(1_000_000, seed).encode(), np.uint8)
    shape = config.steps, config.batch, 1
    first = np.random.default_rng(seed).integers(len(text) - config.length, size=shape)
    return text[first + np.arange(config.length + 1)]


def norm(x, scale=1.0):
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def rotate(x):
    """Positions by rotation: x is [batch, length, heads, size]."""
    length, size = x.shape[1], x.shape[-1]
    angle = jnp.arange(length)[:, None] * 10000.0 ** (-jnp.arange(0, size, 2) / size)
    cos, sin = (f(angle)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Bias(nnx.Variable):
    """Of the experts' scores: it follows the loads, and no gradient sees it."""


class Model(nnx.Module):
    """Parameters are float32; those of the layers have a first dim for the layers."""

    def __init__(self, config: Config, recipe: str, key: jax.Array):
        self.config, self.recipe = config, recipe
        width, inner = config.width, config.expert_width
        shapes = {
            "qkv": (width, 3 * width),
            "out": (width, width),
            "router": (width, config.experts),
            "gate_up": (config.experts, width, 2 * inner),
            "down": (config.experts, inner, width),
            "shared_gate_up": (width, 2 * inner),
            "shared_down": (inner, width),
        }
        keys = iter(jax.random.split(key, len(shapes) + 2))

        def normal(*shape):
            return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

        layers = {name: normal(config.layers, *shape) for name, shape in shapes.items()}
        layers |= {
            name: jnp.ones((config.layers, width)) for name in ("norm_attention", "norm_mlp")
        }
        self.layers = nnx.Dict({name: nnx.Param(x) for name, x in layers.items()})
        self.embedding = nnx.Param(normal(VOCABULARY, width) * VOCABULARY**0.5)
        self.head = nnx.Param(normal(width, VOCABULARY))
        self.biases = Bias(jnp.zeros((config.layers, config.experts)))

    def attention(self, x, p):
        qkv = fp8_dot(x, p["qkv"], recipe=self.recipe)
        q, k, v = jnp.split(qkv.reshape(*x.shape[:-1], 3 * self.config.heads, -1), 3, axis=2)
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return fp8_dot(y.reshape(x.shape), p["out"], recipe=self.recipe)

    def mixture(self, x, p, bias):
        """The experts' sum for each row of x, and how many rows each expert had."""

        def gate_up(w):
            return w.reshape(*w.shape[:-1], 2, -1)

        params = MoEParams(
            p["router"],
            gate_up(p["gate_up"]),
            p["down"],
            bias,
            gate_up(p["shared_gate_up"]),
            p["shared_down"],
        )
        router = functools.partial(route, top_k=self.config.top_k, score="sigmoid")
        y, stats = moe_layer(x, params, router, recipe=self.recipe)
        return y, stats.load

    def __call__(self, tokens):
        """Logits of the bytes that follow, and each layer's loads."""

        def layer(x, parameters):
            p, bias = parameters
            x = x + self.attention(norm(x, p["norm_attention"]), p)
            rows = norm(x, p["norm_mlp"]).reshape(-1, self.config.width)
            y, load = self.mixture(rows, p, bias)
            return x + y.reshape(x.shape), load

        # As a product, whose gradient is one too: that of a gather adds up rows one after another.
        rows = jax.nn.one_hot(tokens, VOCABULARY, dtype=jnp.bfloat16)
        x = rows @ self.embedding.get_value().astype(jnp.bfloat16)
        # Nothing of a layer is kept but its input, as in a model that fills the memory.
        layers = {name: x.get_value() for name, x in self.layers.items()}
        of_layers = layers, self.biases.get_value()
        x, loads = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, of_layers)
        return norm(x).astype(jnp.float32) @ self.head.get_value(), loads

    def balance(self, loads):
        biases = update_bias(self.biases.get_value(), loads, self.config.bias_rate)
        self.biases.set_value(biases)


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, tokens):
    def loss_and_loads(model):
        logits, loads = model(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), loads

    (loss, loads), gradients = nnx.value_and_grad(loss_and_loads, has_aux=True)(model)
    optimizer.update(model, gradients)
    model.balance(loads)
    return loss, loads


def train(config: Config, recipe: str, seed: int = 0, verbose: bool = True) -> dict:
    """The loss of each step, the seconds of one, and how uneven the experts' loads are at last."""
    model = Model(config, recipe, jax.random.key(seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0, config.rate, max(1, config.steps // 10), config.steps, config.rate / 10
    )
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    losses, start = [], time.perf_counter()
    for number, tokens in enumerate(batches(config, seed)):
        loss, loads = step(model, optimizer, tokens.astype(np.int32))
        losses.append(loss)
        if number == 0:  # which compiles
            jax.block_until_ready(loss)
            start = time.perf_counter()
        if verbose and number % 50 == 0:
            print(f"{recipe}  step {number:4}  loss {loss:.4f}", flush=True)
    losses = [round(float(loss), 5) for loss in losses]
    seconds = (time.perf_counter() - start) / max(1, config.steps - 1)
    uneven = float((loads.max(1) / loads.mean(1)).max())
    return {"losses": losses, "seconds": seconds, "greatest_load_over_mean": uneven}


def final_loss(losses: list[float]) -> float:
    """The mean of the last tenth."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def plot(runs: dict, title: str, file: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (whole, difference) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title)
    for recipe, run in runs.items():
        whole.plot(run["losses"], label=recipe.upper(), linewidth=1)
    whole.set(xlabel="step", ylabel="loss", yscale="log")
    whole.legend()
    bf16, fp8 = (np.array(runs[recipe]["losses"]) for recipe in ("bf16", "fp8"))
    difference.plot((fp8 / bf16 - 1) * 100, color="tab:orange", linewidth=0.8)
    difference.axhline(0, color="0.6", linewidth=1)
    difference.set(xlabel="step", ylabel="FP8's loss over BF16's, %")
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", help="file to write the curves to")
    parser.add_argument("--plot", help="file to draw them to")
    options = parser.parse_args(arguments)
    config = SIZES[options.size]
    config = dataclasses.replace(config, steps=options.steps or config.steps)
    runs = {recipe: train(config, recipe) for recipe in ("bf16", "fp8")}
    final = {recipe: final_loss(run["losses"]) for recipe, run in runs.items()}
    for recipe, run in runs.items():
        print(
            f"{recipe}: loss {run['losses'][0]:.3f} -> {final[recipe]:.4f}, "
            f"{run['seconds'] * 1e3:.1f} ms a step, greatest load of an expert "
            f"{run['greatest_load_over_mean']:.2f} x the mean"
        )
    print(f"FP8's final loss is {final['fp8'] / final['bf16'] - 1:+.2%} of BF16's")
    if options.json:
        about = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
            "config": dataclasses.asdict(config),
            "final_loss": final,
        }
        with open(options.json, "w") as file:
            json.dump({"about": about} | runs, file)
    if options.plot:
        title = (
            f"{config.layers} layers of {config.experts} experts, {jax.devices()[0].device_kind}"
        )
        plot(runs, title, options.plot)
    return runs


if __name__ == "__main__":
    main()
