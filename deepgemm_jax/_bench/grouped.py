"""The grouped GEMMs' cases. Groups are as large as those of the reference figures."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import grouped
from ..gemm.op import DEEPGEMM_ALIGNMENT
from ..quantize import per_token_cast_to_fp8, prepare_weight
from ..scaled import ScaledArray
from .case import Case, Program, nbytes, normal
from .gemm import case, float64, sampled_error

ZIPF = 1.2


def sizes(groups: int, expected: int, multiple: int = 1) -> np.ndarray:
    """Rows of each group: 0.7 to 1.3 times as many as expected."""
    rng = random.Random(0)
    drawn = [int(expected * rng.uniform(0.7, 1.3)) for _ in range(groups)]
    return -(-np.array(drawn) // multiple) * multiple


def skewed(groups: int, rows: int) -> np.ndarray:
    """Rows drawn from a Zipf law over half of the groups; the others are empty."""
    rng = np.random.default_rng(0)
    share = np.arange(1, groups // 2 + 1) ** -ZIPF
    drawn = np.zeros(groups, int)
    drawn[rng.permutation(groups)[: groups // 2]] = rng.multinomial(rows, share / share.sum())
    return drawn


def padded_ids(counts: np.ndarray, multiple: int) -> np.ndarray:
    """Each row's group, whose rows are followed by as many of none as make a multiple."""
    return np.repeat(
        np.stack([np.arange(len(counts)), np.full(len(counts), -1)], 1).reshape(-1),
        np.stack([counts, -counts % multiple], 1).reshape(-1),
    )


def weights(groups: int, n: int, k: int) -> ScaledArray:
    """Each group's is quantised alone: in bfloat16 all of them may not fit."""
    one = jax.jit(prepare_weight)
    each = [one(normal(1 + g, n, k)) for g in range(min(groups, 8))]
    # Of more groups than that the contents repeat; their memory does not.
    return jax.tree.map(lambda *x: jnp.stack([x[g % len(x)] for g in range(groups)]), *each)


def contiguous(groups: int, expected: int, n: int, k: int) -> Case:
    return _contiguous(sizes(groups, expected), n, k)


def contiguous_skewed(groups: int, expected: int, n: int, k: int) -> Case:
    return _contiguous(skewed(groups, groups * expected), n, k)


def contiguous_aligned(groups: int, expected: int, n: int, k: int) -> Case:
    """As DeepGEMM wants them: filled up with rows of no group."""
    return _contiguous(sizes(groups, expected), n, k, DEEPGEMM_ALIGNMENT)


def bf16_contiguous(groups: int, expected: int, n: int, k: int) -> Case:
    counts = sizes(groups, expected)
    a, b = normal(0, counts.sum(), k), normal(1, groups, n, k)
    return _rows_case(grouped.m_grouped_bf16_gemm_nt_contiguous, a, b, counts, "bf16")


def ragged_dot(groups: int, expected: int, n: int, k: int) -> Case:
    """In bfloat16, beside jax.lax's."""
    counts = sizes(groups, expected)
    lhs, rhs = normal(0, counts.sum(), k), normal(1, groups, k, n)
    args = lhs, rhs, jnp.asarray(counts, jnp.int32)
    ids = np.repeat(np.arange(groups), counts)
    return case(
        Program(grouped.ragged_dot, args),
        len(ids) * n * k,
        "bf16",
        lambda result: _rows_error(result, lhs, rhs.swapaxes(1, 2), ids),
        others={"xla_bf16": Program(jax.lax.ragged_dot, args)},
    )


def masked(groups: int, rows: int, expected: int, n: int, k: int) -> Case:
    counts = np.minimum(sizes(groups, expected), rows)
    flat = jax.jit(per_token_cast_to_fp8)(normal(0, groups * rows, k))
    a = jax.tree.map(lambda x: x.reshape(groups, rows, -1), flat)
    b = weights(groups, n, k)
    valid = np.arange(rows) < counts[:, None]
    ids = np.where(valid, np.arange(groups)[:, None], -1).reshape(-1)
    return case(
        Program(
            functools.partial(grouped.m_grouped_fp8_gemm_nt_masked, expected_m=expected),
            (a, b, jnp.asarray(counts, jnp.int32)),
        ),
        int(counts.sum()) * n * k,
        "fp8",
        lambda result: _rows_error(result.reshape(groups * rows, n), flat, b, ids),
        moved=nbytes(b) + int(counts.sum()) * (nbytes(a) // (groups * rows) + 2 * n),
    )


def k_grouped(groups: int, m: int, n: int, expected: int) -> Case:
    """In float32, added to C."""
    counts = sizes(groups, expected, DEEPGEMM_ALIGNMENT)
    a, b = (
        jax.jit(per_token_cast_to_fp8)(normal(seed, rows, counts.sum()))
        for seed, rows in ((0, m), (1, n))
    )
    ends = np.cumsum(counts)

    def product(rows, columns):
        right = float64(b, columns)
        spans = [slice(ends[g] - counts[g], ends[g]) for g in rows // m]
        left = float64(a, rows % m)
        return np.stack([right[:, s] @ x[s] for s, x in zip(spans, left, strict=True)])

    return case(
        Program(
            lambda a, b, c, sizes: grouped.k_grouped_fp8_gemm_nt_contiguous(
                a, b, c, group_sizes=sizes
            ),
            (a, b, jnp.zeros((groups, m, n)), jnp.asarray(counts, jnp.int32)),
        ),
        int(counts.sum()) * m * n,
        "fp8",
        lambda d: sampled_error(d.reshape(groups * m, n), np.arange(groups * m), product),
    )


def _contiguous(counts: np.ndarray, n: int, k: int, multiple: int = 1) -> Case:
    rows = len(padded_ids(counts, multiple))
    a = jax.jit(per_token_cast_to_fp8)(normal(0, rows, k))
    b = weights(len(counts), n, k)
    op = grouped.m_grouped_fp8_gemm_nt_contiguous
    return _rows_case(op, a, b, counts, "fp8", multiple)


def _rows_case(
    op: Callable, a: Any, b: Any, counts: np.ndarray, peak: str, multiple: int = 1
) -> Case:
    """Told the groups' sizes, or where they are filled up to a multiple, each row's group."""
    groups, n, k = b.shape
    ids = padded_ids(counts, multiple)
    told = {"group_sizes": counts} if multiple == 1 else {"m_indices": ids}
    valid, used = counts.sum(), np.count_nonzero(counts)
    return case(
        Program(
            lambda a, b, told: op(a, b, **told),
            (a, b, jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), told)),
        ),
        valid * n * k,
        peak,
        lambda result: _rows_error(result, a, b, ids),
        moved=nbytes(b) * used // groups + valid * (nbytes(a) // len(ids) + 2 * n),
    )


def _rows_error(result: jax.Array, a: Any, b: Any, ids: np.ndarray) -> float:
    """Of rows times the matrix of each row's group."""

    def product(rows, columns):
        each = zip(float64(a, rows), ids[rows], strict=True)
        return np.stack([float64(jax.tree.map(lambda x: x[g], b), columns) @ x for x, g in each])  # noqa: B023

    return sampled_error(result, np.flatnonzero(ids >= 0), product)
