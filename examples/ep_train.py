"""Trains a small mixture-of-experts language model on a mesh, in one process or many.

    python examples/ep_train.py --mesh data=1,expert=1
    python examples/ep_train.py --mesh data=2,expert=4 --strategy all_to_all   # 8 devices

and over hosts the same line on each of them, with its own number (on Slurm, GKE or Cloud TPU, where
JAX finds the others by itself, `--distributed` alone):

    python examples/ep_train.py --mesh data=2,expert=8 --distributed \\
        --coordinator host0:1234 --processes 2 --process 0

The model reads sums, "17+25=42;", and learns to continue them. Axes of the mesh are `data`,
`expert` and `tensor`; those left out have length 1. Sequences are divided along the first two,
experts along the second, and each expert along the third; what is the same on several devices has
its gradient summed over them by JAX.
"""

import argparse
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepgemm_jax.moe import Axes, MoEParams, moe_layer, route, update_bias

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 128, 128, 16, 4
VOCABULARY = "0123456789+=;"
ROUTER = functools.partial(route, top_k=TOP_K, score="sigmoid")
AXES = Axes(expert="expert", tokens=("data",), tensor="tensor")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    attention: jax.Array  # [H, 3, H]: queries, keys and values
    moe: MoEParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    embedding: jax.Array  # [V, H], and the logits' matrix
    position: jax.Array  # [S, H]
    blocks: list[Block]


def init(key, layers, length):
    keys = iter(jax.random.split(key, 2 + 2 * layers))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) * HIDDEN**-0.5

    def moe():
        sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "experts": EXPERTS}
        return MoEParams.init(next(keys), **sizes, shared=INTERMEDIATE)

    return Model(
        normal(len(VOCABULARY), HIDDEN),
        normal(length, HIDDEN),
        [Block(normal(HIDDEN, 3, HIDDEN), moe()) for _ in range(layers)],
    )


def specs(model):
    """How the model's arrays lie on the mesh: whole everywhere, but for the experts."""
    whole = jax.tree.map(lambda _: P(), model)
    blocks = [
        dataclasses.replace(block, moe=AXES.param_specs(of.moe))
        for block, of in zip(whole.blocks, model.blocks, strict=True)
    ]
    return dataclasses.replace(whole, blocks=blocks)


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def attend(x, weight):
    q, k, v = jnp.einsum("bsh,hcd->cbsd", norm(x), weight)
    scores = jnp.einsum("bsd,btd->bst", q, k) * HIDDEN**-0.5
    seen = jnp.tril(jnp.ones(scores.shape[1:], bool))
    return jnp.einsum("bst,btd->bsd", jax.nn.softmax(jnp.where(seen, scores, -1e30)), v)


def loss(model, text, **options):
    """Of one device's sequences [B, S + 1], averaged over all; and each layer's load."""
    x = model.embedding[text[:, :-1]] + model.position
    loads = []
    for block in model.blocks:
        x += attend(x, block.attention)
        y, stats = moe_layer(norm(x).reshape(-1, HIDDEN), block.moe, ROUTER, axes=AXES, **options)
        x += y.reshape(x.shape)
        loads.append(stats.load)
    logits = norm(x) @ model.embedding.T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), text[:, 1:, None], axis=-1)
    return jax.lax.pmean(-picked.mean(), AXES.of_tokens), loads


def make_step(mesh, model, rate, **options):
    sharded = jax.shard_map(
        functools.partial(loss, **options),
        mesh=mesh,
        in_specs=(specs(model), AXES.token_spec()),
        out_specs=P(),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(model, moments, number, text):
        (value, loads), gradient = jax.value_and_grad(sharded, has_aux=True)(model, text)
        first, second = moments
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, gradient)
        scale = rate * jnp.sqrt(1 - 0.99**number) / (1 - 0.9**number)
        model = jax.tree.map(
            lambda w, m, v: w - scale * m / (jnp.sqrt(v) + 1e-8), model, first, second
        )
        # The router's bias has no gradient: it follows the load.
        blocks = [
            dataclasses.replace(
                block,
                moe=dataclasses.replace(block.moe, bias=update_bias(block.moe.bias, load, 1e-2)),
            )
            for block, load in zip(model.blocks, loads, strict=True)
        ]
        return dataclasses.replace(model, blocks=blocks), (first, second), value, loads

    return step


def sums(rng, sequences, length):
    """Text of so many characters, from anywhere in a stream of sums: int32 [sequences, length]."""
    numbers = rng.integers(0, 50, size=(sequences, length // 4 + 2, 2))
    text = ["".join(f"{a}+{b}={a + b};" for a, b in row) for row in numbers]
    start = rng.integers(0, 6, size=sequences)
    cut = [row[s : s + length] for row, s in zip(text, start, strict=True)]
    return np.array([[VOCABULARY.index(letter) for letter in row] for row in cut], np.int32)


def make_mesh(description):
    lengths = dict(part.split("=") for part in description.split(","))
    names = ("data", "expert", "tensor")
    shape = [int(lengths.pop(name, 1)) for name in names]
    if lengths:
        raise SystemExit(f"--mesh knows the axes {', '.join(names)}, not {', '.join(lengths)}")
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", default="data=1,expert=1", help="for instance data=2,expert=4")
    parser.add_argument(
        "--strategy",
        default="all_gather",
        choices=["all_gather", "all_to_all", "ragged_all_to_all"],
    )
    parser.add_argument("--recipe", default="fp8", choices=["fp8", "bf16"])
    parser.add_argument("--capacity-factor", type=float)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64, help="in a batch, of all devices")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--distributed", action="store_true", help="this is one process of many")
    parser.add_argument("--coordinator", help="host:port of process 0, where JAX cannot know it")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    flags = parser.parse_args(arguments)
    if flags.distributed:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process)

    mesh = make_mesh(flags.mesh)
    make = functools.partial(init, layers=flags.layers, length=flags.length)
    shapes = jax.eval_shape(make, jax.random.key(0))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(shapes))
    # Every process computes its own part of the same model.
    model = jax.jit(make, out_shardings=shardings)(jax.random.key(0))
    zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, shapes), out_shardings=shardings)
    moments = zeros(), zeros()
    step = make_step(
        mesh,
        shapes,
        flags.rate,
        strategy=flags.strategy,
        recipe=flags.recipe,
        capacity_factor=flags.capacity_factor,
    )
    rng = np.random.default_rng(0)
    losses = []
    for number in range(1, flags.steps + 1):
        text = sums(rng, flags.sequences, flags.length + 1)
        text = jax.make_array_from_callback(
            text.shape, NamedSharding(mesh, AXES.token_spec()), lambda i, text=text: text[i]
        )
        model, moments, value, loads = step(model, moments, number, text)
        losses.append(float(value))
        if jax.process_index() == 0 and (number % 20 == 0 or number in (1, flags.steps)):
            fullest = max(float(load.max() / load.mean()) for load in loads)
            print(f"step {number}: loss {losses[-1]:.4f}, fullest expert {fullest:.2f} × the mean")
    return losses


if __name__ == "__main__":
    main()
