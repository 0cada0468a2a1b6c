"""Random layers, as the package computes them and as NumPy or jax.numpy do in any dtype."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from deepgemm_jax import fp8_dot, grouped_linear, grouped_mlp

G = 4
# Parts of the rows that each group has: unaligned, one empty, a tail of no group; or all has one.
SIZES = {"tail": (0.4, 0, 0.15, 0.3), "one": (0, 0, 2, 0)}

# Bounds of ‖found - wanted‖ / ‖wanted‖ for operands that are normal numbers, through one product
# after the other: e4m3 rounds each operand of a product by 0.026 in the mean, bfloat16 by 0.0017.
LINEAR = {"fp8": 0.04, "bf16": 0.004}
MLP = {"fp8": 0.08, "bf16": 0.006}


def sizes_of(name: str, rows: int) -> np.ndarray:
    return np.array([int(part * rows) for part in SIZES[name]], np.int32)


def ids_of(sizes, rows: int, first: int = 0, count: int = G) -> np.ndarray:
    """Which weight each row is multiplied by, -1 for none."""
    ids = np.repeat(np.arange(len(sizes)), np.clip(sizes, 0, rows))[:rows] - first
    ids = np.where((ids >= 0) & (ids < count), ids, -1)
    return np.pad(ids, (0, rows - len(ids)), constant_values=-1)


def dense(xp, ids, x, w):
    return x @ w


def grouped(xp, ids, x, w):
    return sum(xp.where((ids == g)[:, None], x @ w[g], 0) for g in range(len(w)))


def mlp(xp, ids, x, gate_up, down, router_weights=None):
    gate, up = xp.split(grouped(xp, ids, x, gate_up), 2, axis=-1)
    y = gate / (1 + xp.exp(-gate)) * up
    if router_weights is not None:
        y = y * router_weights[:, None]
    return grouped(xp, ids, y, down)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One of the package's functions, what it is to compute, and the shapes of its operands."""

    function: Callable  # (*operands, sizes, **options)
    formula: Callable  # (numpy or jax.numpy, ids, *operands)
    shapes: Callable  # of M, K and N
    tolerance: dict[str, float]  # by the recipe

    def problem(self, seed: int, m: int, k: int, n: int) -> list[np.ndarray]:
        """Operands that make results of about one, and the gradient of the result."""
        rng = np.random.default_rng(seed)
        *operands, d = (rng.normal(size=shape) for shape in (*self.shapes(m, k, n), (m, n)))
        x, *weights = operands
        return [x, *(w / w.shape[-2] ** 0.5 if w.ndim > 1 else w for w in weights), d]

    def of(self, sizes, rows: int, xp=np, **shard) -> Callable:
        return functools.partial(self.formula, xp, ids_of(sizes, rows, **shard))


LAYERS = {
    "fp8_dot": Layer(
        lambda x, w, sizes, **options: fp8_dot(x, w, **options),
        dense,
        lambda m, k, n: [(m, k), (k, n)],
        LINEAR,
    ),
    "grouped_linear": Layer(grouped_linear, grouped, lambda m, k, n: [(m, k), (G, k, n)], LINEAR),
    "grouped_mlp": Layer(
        lambda x, gate_up, down, router_weights, sizes, **options: grouped_mlp(
            x, gate_up, down, sizes, router_weights, **options
        ),
        mlp,
        lambda m, k, n: [(m, k), (G, k, 2 * n), (G, n, n), (m,)],
        MLP,
    ),
}


def finite_differences(function, operands, d, step=1e-4):
    """The gradient of Σ function(*operands) d, in float64, element by element."""
    operands = [np.array(x, np.float64) for x in operands]
    gradients = [np.zeros_like(x) for x in operands]
    for x, gradient in zip(operands, gradients, strict=True):
        for at in np.ndindex(x.shape):
            before, values = x[at], []
            for x[at] in (before + step, before - step):
                values.append((function(*operands) * d).sum())
            x[at] = before
            gradient[at] = (values[0] - values[1]) / (2 * step)
    return gradients


def relative_error(found, wanted) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
