"""Random grouped problems, and what their results must be: NumPy loops over groups, in float64."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BLOCK, Oracle, product, random_matrix

import deepgemm_jax
from deepgemm_jax import ScaledArray


def swap(x):
    """The last two dims the other way round."""
    return jax.tree.map(lambda leaf: np.ascontiguousarray(np.swapaxes(leaf, -1, -2)), x)


def random_array(rng, *shape, dtype=jnp.bfloat16):
    x = rng.normal(size=shape) * rng.lognormal(size=shape)
    return np.where(rng.random(shape) < 0.03, 0, x).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Form:
    """One of the functions of a kind, and how its operands are laid out."""

    name: str

    @property
    def function(self) -> Callable:
        return getattr(deepgemm_jax, self.name)

    @property
    def fp8(self) -> bool:
        return "fp8" in self.name

    def __str__(self) -> str:
        return self.name

    def problem(self, seed, m, n, k, g, batch=()):
        """Operands of an m-grouped GEMM: rows of all groups, and a matrix for each."""
        rng = np.random.default_rng(seed)
        if self.fp8:
            a, b = random_matrix(rng, m, k, 1, batch), random_matrix(rng, n, k, BLOCK, (*batch, g))
        else:
            a, b = random_array(rng, *batch, m, k), random_array(rng, *batch, g, n, k)
        return a, swap(b) if "_nn_" in self.name else b

    def masked_problem(self, seed, m, n, k, g, batch=()):
        rng = np.random.default_rng(seed)
        batch = (*batch, g)
        if self.fp8:
            return random_matrix(rng, m, k, 1, batch), random_matrix(rng, n, k, BLOCK, batch)
        return random_array(rng, *batch, m, k), random_array(rng, *batch, n, k)

    def sum_problem(self, seed, m, n, k, batch=()):
        """Operands of a k-grouped GEMM."""
        rng = np.random.default_rng(seed)
        if self.fp8:
            pair = [random_matrix(rng, rows, k, 1, batch) for rows in (m, n)]
        else:
            pair = [random_array(rng, *batch, rows, k) for rows in (m, n)]
        return [swap(x) for x in pair] if "_tn_" in self.name else pair

    def dense(self, a, b) -> Oracle:
        """A times one group's B, transposed."""
        return product(a, b) if self.fp8 else plain(a, b)

    def expected(self, a, b, ids) -> Oracle:
        b = swap(b) if "_nn_" in self.name else b
        m, n = jax.tree.leaves(a)[0].shape[0], jax.tree.leaves(b)[0].shape[1]
        value, magnitude = np.zeros((2, m, n))
        for g in range(jax.tree.leaves(b)[0].shape[0]):
            rows = np.asarray(ids) == g
            one = self.dense(pick(a, rows), pick(b, g))
            value[rows], magnitude[rows] = one.value, one.magnitude
        return Oracle(value, magnitude)

    def expected_sums(self, a, b, spans, c=None) -> Oracle:
        a, b = (swap(x) if "_tn_" in self.name else x for x in (a, b))
        a, b = (dequantize(x) for x in (a, b))
        each = [plain(a[:, s], b[:, s]) for s in (slice(*span) for span in spans)]
        value, magnitude = (np.stack([getattr(d, x) for d in each]) for x in vars(each[0]))
        if c is not None:
            value, magnitude = value + c, magnitude + abs(c)
        return Oracle(value, magnitude)


def forms(*names: str):
    return pytest.mark.parametrize("form", [Form(name) for name in names], ids=str)


contiguous = forms(
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nn_contiguous",
)
masked = forms("m_grouped_fp8_gemm_nt_masked", "m_grouped_bf16_gemm_nt_masked")
k_grouped = forms(
    "k_grouped_fp8_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_bf16_gemm_nt_contiguous",
)


# Of matrices of bfloat16: whatever they are, some with rows that no kernel can load.
any_lengths = pytest.mark.parametrize("lengths", [(9, 15), (8, 8), (1, 24), (0, 16)], ids=str)

# Each recipe's scales of A and of B, by rows and along K, of N and K between 129 and 256; None is
# one for each row.
every_recipe = pytest.mark.parametrize(
    ("recipe", "of_a", "of_b"),
    [
        ((1, BLOCK, BLOCK), (None, 2), (2, 2)),
        ((1, 1, BLOCK), (None, 2), (None, 2)),
        ((1, 1, 0), (None, 1), (None, 1)),
        ((1, 1, 0), (1, 1), (1, 1)),
    ],
    ids=str,
)


def scaled(rng, dtype, scales, *shape) -> ScaledArray:
    """Random data with such scales."""
    rows, along_k = scales
    scale = rng.lognormal(size=(*shape[:-2], shape[-2] if rows is None else rows, along_k))
    return ScaledArray(random_array(rng, *shape, dtype=dtype), scale.astype(np.float32))


def plain(a, b) -> Oracle:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return Oracle(a @ b.T, abs(a) @ abs(b).T)


def dequantize(x) -> np.ndarray:
    """In float64, of scales of blocks along the last dim."""
    if not isinstance(x, ScaledArray):
        return np.asarray(x, np.float64)
    scale = np.repeat(np.asarray(x.scale, np.float64), BLOCK, axis=-1)
    return np.asarray(x.data, np.float64) * scale[..., : x.data.shape[-1]]


def pick(x, index):
    return jax.tree.map(lambda leaf: leaf[index], x)


def spans(sizes, rows) -> list[tuple[int, int]]:
    """First row and end of each group, one after the other."""
    result, end = [], 0
    for size in sizes:
        start, end = end, min(end + max(int(size), 0), rows)
        result.append((start, end))
    return result


def ids(sizes, rows, first=0, count=None) -> np.ndarray:
    """The group of each row, counted from group `first` on; -1 for those of no group."""
    result = np.full(rows, -1)
    for g, (start, end) in enumerate(spans(sizes, rows)):
        if 0 <= g - first < (len(sizes) if count is None else count):
            result[start:end] = g - first
    return result


# Sums equal to 70 rows, below and above; empty groups, all in one, negative sizes, overflow.
SIZES = [
    [20, 13, 0, 37],
    [1, 1, 1, 67],
    [0, 0, 70, 0],
    [0, 0, 0, 0],
    [3, 0, 5, 1],
    [30, 30, 30, 30],
    [-5, 20, -1, 10],
    [1000, 1, 1, 1],
    [2**31 - 1, 2**31 - 1, -(2**31), 5],
]
