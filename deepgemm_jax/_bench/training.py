"""A step of a grouped MLP, forward and backward, in FP8 and in BF16, by time and by memory."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..grouped import (
    k_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    ragged_dot,
)
from ..quantize import per_token_cast_to_fp8, prepare_weight, quantize_transpose
from ..training import grouped_mlp
from .case import Program
from .results import Results, Row
from .run import compiled, start
from .timing import Timer, mean_us

OP = "grouped_mlp forward + backward"
SHAPE = (8, 4096, 7168, 2048)  # groups, rows of each in the mean, width, width of the gates
LAYERS = 8
COMPILES = 3  # of which the fastest counts
FIELDS = (
    "us, bf16_us, xla_us: all kernels of the value and of all gradients, of grouped_mlp in FP8, of "
    "the same by ragged_dot in BF16, and by jax.lax.ragged_dot. {forward,dgrad,wgrad}_us: the two "
    "GEMMs of each alone, on operands quantised before; quantise_us: what is left of us. "
    "*peak_mb: the program's arguments, results and temporary memory, as XLA assigns it; "
    "*loss_peak_mb: that of the value and gradients of the result's square. error: of the "
    "gradients, the largest ‖FP8 - BF16‖ / ‖BF16‖. *compile_s: XLA's and JAX's time for the "
    f"gradient of a scan over {LAYERS} such layers under jax.checkpoint, with kernels compiled "
    f"before, the least of {COMPILES}; *layers_peak_mb: that program's memory, "
    "*kept_layers_peak_mb: the same without jax.checkpoint, where what a layer keeps for its "
    "gradient is there for all."
)


def main(options: argparse.Namespace) -> int:
    session = start(options, FIELDS)
    if session is None:
        return 2
    results = Results(session.file("_training.json"), session.about)
    for shape in options.shapes or [SHAPE]:
        row = measure(*shape, timer=session.timer)
        results.add(row)
        report(row)
    return 0


def measure(groups: int, rows: int, width: int, gates: int, *, timer: Timer) -> Row:
    *operands, sizes, d = problem(groups, rows, width, gates)
    flops = 3 * 2 * groups * rows * width * 3 * gates
    row: Row = {"op": OP, "shape": [groups, rows, width, gates]}
    results = {}
    for name, function in VERSIONS.items():
        run = jax.jit(functools.partial(step, function)).lower(operands, sizes, d).compile()
        call = functools.partial(run, operands, sizes, d)
        results[name] = [np.asarray(x[..., ::16], np.float32) for x in call()[1]]
        row[f"{name}us"] = mean_us(timer(call), timer.calls)
        row[f"{name}peak_mb"] = peak_bytes(run) / 1e6
        gradient = jax.value_and_grad(functools.partial(half_square, function), (0, 1, 2, 3))
        run = jax.jit(gradient).lower(*operands, sizes).compile()
        row[f"{name}loss_peak_mb"] = peak_bytes(run) / 1e6
    row["tflops"] = flops / row["us"] / 1e6
    row["error"] = max(map(_relative_error, results[""], results["bf16_"]))
    for name, program in gemms(operands, sizes, d).items():
        row[f"{name}_us"] = mean_us(timer(compiled(program)), timer.calls)
    row["quantise_us"] = row["us"] - sum(row[f"{name}_us"] for name in GEMMS)
    recipes = {"fp8": "", "bf16": "bf16_"}
    seconds: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for recipe in [*recipes] * COMPILES:
        jax.clear_caches()
        start = time.perf_counter()
        run = layers(jax.checkpoint, recipe, operands, sizes)
        seconds[recipe].append(time.perf_counter() - start)
        row[f"{recipes[recipe]}layers_peak_mb"] = peak_bytes(run) / 1e6
    for recipe, name in recipes.items():
        row[f"{name}compile_s"] = min(seconds[recipe])
        kept = layers(lambda layer: layer, recipe, operands, sizes)
        row[f"{name}kept_layers_peak_mb"] = peak_bytes(kept) / 1e6
    return row


GEMMS = "forward", "dgrad", "wgrad"


def problem(groups: int, rows: int, width: int, gates: int) -> list[jax.Array]:
    """x, both weights, the router's weights, the groups' sizes and the result's gradient."""
    m = groups * rows
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return (jax.random.normal(next(keys), shape) * scale).astype(jnp.bfloat16)

    sizes = np.random.default_rng(0).multinomial(m, [1 / groups] * groups).astype(np.int32)
    return [
        normal(m, width),
        normal(groups, width, 2 * gates, scale=width**-0.5),
        normal(groups, gates, width, scale=gates**-0.5),
        jax.nn.sigmoid(normal(m).astype(jnp.float32)),
        jnp.asarray(sizes),
        normal(m, width),
    ]


def step(function: Callable, operands: Sequence[jax.Array], sizes: jax.Array, d: jax.Array) -> Any:
    y, pullback = jax.vjp(lambda *xs: function(*xs[:3], sizes, xs[3]), *operands)
    return y, pullback(d)


def by_ragged_dot(
    dot: Callable,
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    sizes: jax.Array,
    router_weights: jax.Array,
) -> jax.Array:
    gate, up = jnp.split(dot(x, gate_up, sizes).astype(jnp.float32), 2, axis=-1)
    y = jax.nn.silu(gate) * up * router_weights[:, None]
    return dot(y.astype(x.dtype), down, sizes)


def half_square(function: Callable, x, gate_up, down, router_weights, sizes) -> jax.Array:
    """A loss, whose gradient is there only after the forward pass, as in training."""
    return (function(x, gate_up, down, sizes, router_weights).astype(jnp.float32) ** 2).sum() / 2


VERSIONS: dict[str, Callable] = {
    "": grouped_mlp,
    "bf16_": functools.partial(by_ragged_dot, ragged_dot),
    "xla_": functools.partial(by_ragged_dot, jax.lax.ragged_dot),
}


def gemms(operands: Sequence[jax.Array], sizes: jax.Array, d: jax.Array) -> dict[str, Program]:
    """The GEMMs of a step, on operands of their shapes."""

    @jax.jit
    def quantised(x, gate_up, down, sizes, d):
        y, dh = x[:, : down.shape[1]], x[:, : gate_up.shape[2]]
        rows = [per_token_cast_to_fp8(a) for a in (x, y, d, dh)]
        columns = [quantize_transpose(a, sizes)[1] for a in (x, y, d, dh)]
        padded = quantize_transpose(x, sizes)[2]
        weights = [prepare_weight(w, layout="kn", transposed=True) for w in (gate_up, down)]
        return rows, columns, padded, weights

    (x, y, d, dh), (xt, yt, dt, dht), padded, (gate_up, down) = quantised(*operands[:3], sizes, d)

    def by_rows(a, b, sizes):
        return [
            m_grouped_fp8_gemm_nt_contiguous(*ab, group_sizes=sizes)
            for ab in zip(a, b, strict=True)
        ]

    def by_columns(a, b, sizes):
        return [
            k_grouped_fp8_gemm_nt_contiguous(*ab, group_sizes=sizes)
            for ab in zip(a, b, strict=True)
        ]

    return {
        "forward": Program(by_rows, ([x, y], [gate_up[0], down[0]], sizes)),
        "dgrad": Program(by_rows, ([d, dh], [down[1], gate_up[1]], sizes)),
        "wgrad": Program(by_columns, ([xt, yt], [dht, dt], padded)),
    }


def layers(
    remat: Callable, recipe: str, operands: Sequence[jax.Array], sizes: jax.Array
) -> jax.stages.Compiled:
    """The gradient of a scan over such layers, compiled."""
    x, *parameters = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands)
    parameters = [jax.ShapeDtypeStruct((LAYERS, *a.shape), a.dtype) for a in parameters]

    def loss(x, parameters, sizes):
        @remat
        def layer(x, p):
            gate_up, down, router_weights = p
            return x + grouped_mlp(x, gate_up, down, sizes, router_weights, recipe=recipe), None

        return jax.lax.scan(layer, x, parameters)[0].astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, (0, 1))).lower(x, parameters, sizes).compile()


def peak_bytes(run: Any) -> int:
    memory = run.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _relative_error(x: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(x - wanted) / np.linalg.norm(wanted))


def report(row: Row) -> None:
    shape = "×".join(map(str, row["shape"]))
    print(f"{OP} {shape}: {row['us'] / 1e3:.2f} ms, {row['tflops']:.0f} TFLOPS")
    for name in (*GEMMS, "quantise"):
        print(f"  {name:9} {row[f'{name}_us'] / 1e3:6.2f} ms  {row[f'{name}_us'] / row['us']:.0%}")
    print(
        f"  {LAYERS} layers compile in {row['compile_s']:.1f} s, "
        f"{row['compile_s'] / row['bf16_compile_s']:.2f} × BF16's time, and take "
        f"{row['layers_peak_mb'] / row['bf16_layers_peak_mb']:.2f} × its memory under "
        f"jax.checkpoint, {row['kept_layers_peak_mb'] / row['bf16_kept_layers_peak_mb']:.2f} × "
        f"without ({row['kept_layers_peak_mb']:.0f} MB)"
    )
    for name, what in (("bf16", "ragged_dot in BF16"), ("xla", "jax.lax.ragged_dot")):
        print(
            f"  {row[f'{name}_us'] / row['us']:.2f} × the speed of {what}, "
            f"{row['peak_mb'] / row[f'{name}_peak_mb']:.2f} × its memory ({row['peak_mb']:.0f} MB),"
            f" {row['loss_peak_mb'] / row[f'{name}_loss_peak_mb']:.2f} × with a loss"
        )
