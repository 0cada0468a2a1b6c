"""The indexer's kernels on the host, where there is no GPU: exact on integers."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import Problem, logits, paged, random_problem
from attention_simulator import simulate_logits, simulate_paged, simulate_topk
from simulator_build import build

from deepgemm_jax import fp8_mqa_logits
from deepgemm_jax.attention.config import H200, TOPK_VARIANTS, choose_logits


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """(queries of a sequence, heads) -> the kernel that is chosen for them, but for its ring of
    keys, which is short, so that it goes round."""
    folder = tmp_path_factory.mktemp("kernels")

    @functools.cache
    def built(config):
        short = dataclasses.replace(config, stages=2)
        return build("logits.cc", dataclasses.astuple(short), folder)

    return lambda queries, heads: built(choose_logits(queries, heads, H200))


def whole_problem(seed, s, t, h, d, batch=()) -> Problem:
    """Every sum of it is exact."""
    rng = np.random.default_rng(seed)
    problem = random_problem(seed, s, t, h, d, batch)
    data, scale = problem.kv
    return dataclasses.replace(
        problem,
        q=rng.integers(-2, 3, problem.q.shape).astype(problem.q.dtype),
        kv=(
            rng.integers(-2, 3, data.shape).astype(data.dtype),
            np.exp2(rng.integers(-1, 2, scale.shape)).astype(np.float32),
        ),
        weights=rng.integers(-3, 4, problem.weights.shape).astype(np.float32),
    )


def assert_exact(found, wanted):
    np.testing.assert_array_equal(found, wanted.astype(found.dtype))


@pytest.mark.parametrize("width", [None, 1, 97])
@pytest.mark.parametrize(
    ("s", "t", "h", "d", "dtype"),
    [
        (3, 900, 12, 128, jnp.float32),
        (20, 90, 13, 64, jnp.float32),
        (230, 90, 14, 64, jnp.bfloat16),
        (9, 200, 124, 32, jnp.bfloat16),
        (1, 300, 65, 32, jnp.float32),
    ],
)
def test_prefill(kernel, s, t, h, d, dtype, width):
    problem = whole_problem(0, s, t, h, d)
    found = simulate_logits(kernel(s, h), problem, width or t, dtype, compressed=width is not None)
    assert_exact(found, logits(problem, width).value)


def test_logits_that_are_not_clean(kernel):
    problem = whole_problem(1, 37, 150, 13, 128)
    wanted = logits(problem).value
    seen = np.isfinite(wanted)
    found = simulate_logits(kernel(37, 13), problem, 150, clean=False)
    assert_exact(found[seen], wanted[seen])


def test_nan_and_infinity(kernel):
    problem = whole_problem(2, 20, 50, 16, 32)
    problem.q[7, 0, 0] = np.nan
    problem.kv[0][11, 3] = np.nan
    problem.kv[1][[5, 6]] = np.inf, np.nan
    problem.weights[3, 1] = np.nan
    problem.weights[4, 2] = -np.inf
    wanted = np.asarray(fp8_mqa_logits(*problem.arguments))
    assert_exact(simulate_logits(kernel(20, 16), problem, 50), wanted)


def test_batch_of_keys(kernel):
    problem = whole_problem(3, 3, 101, 13, 64, batch=(4,))
    assert_exact(simulate_logits(kernel(3, 13), problem, 101), logits(problem).value)


# ---- paged --------------------------------------------------------------------------------------


def sequences(seed, ends, h, d, block_kv, columns, max_blocks):
    """simulate_paged's arguments, and the logits. `ends`: of each query."""
    ends = np.array(ends, np.int32)
    b, next_n = ends.shape
    each = [whole_problem(seed + i, next_n, n, h, d) for i, n in enumerate(ends.max(1))]
    cache, table = paged(np.random.default_rng(seed), [p.kv for p in each], block_kv, max_blocks)
    # There is nothing behind what the last sequence needs.
    used = (b - 1) * max_blocks + -(-min(ends[-1].max(), columns) // block_kv)
    zeros = np.zeros(next_n, np.int32)
    return (
        np.stack([p.q for p in each]),
        cache,
        np.stack([p.weights for p in each]),
        ends,
        table.ravel()[:used],
        columns,
        max_blocks,
    ), np.concatenate(
        [
            logits(dataclasses.replace(p, start=zeros, end=end), columns).value
            for p, end in zip(each, ends, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("ends", "block_kv", "columns", "max_blocks"),
    [
        ([[0], [1], [300], [64], [65]], 64, 320, 6),
        ([[200], [0]], 32, 150, 7),
        ([[70, 71, 72], [0, 0, 0], [0, 0, 1], [128, 3, 129]], 32, 140, 9),
        ([[500], [10]], 64, 500, 20),
        ([[0], [0]], 64, 100, 2),
    ],
)
def test_paged(kernel, ends, block_kv, columns, max_blocks):
    arguments, wanted = sequences(4, ends, 13, 128, block_kv, columns, max_blocks)
    assert_exact(simulate_paged(kernel(len(ends[0]), 13), *arguments), wanted)


def test_paged_logits_that_are_not_clean(kernel):
    arguments, wanted = sequences(5, [[0], [30], [170]], 13, 64, 64, 200, 3)
    found = simulate_paged(kernel(1, 13), *arguments, clean=False)
    seen = np.isfinite(wanted)
    assert_exact(found[seen], wanted[seen])


def test_batch_of_caches(kernel):
    ends = [[10, 90], [96, 33]]
    both = [sequences(6 + 2 * i, ends[::step], 13, 64, 32, 96, 3) for i, step in enumerate((1, -1))]
    # The first one's table has nothing to spare.
    stacked = [np.stack(x) for x in zip(*(a[:5] for a, _ in both), strict=True)]
    q, cache, weights, ends, table = stacked
    q, weights, ends = (x.reshape(-1, *x.shape[2:]) for x in (q, weights, ends))
    found = simulate_paged(kernel(2, 13), q, cache, weights, ends, table, 96, 3)
    assert_exact(found, np.concatenate([wanted for _, wanted in both]))


# ---- top-k --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", TOPK_VARIANTS, ids=str)
def test_topk(variant, tmp_path):
    library = build("topk.cc", dataclasses.astuple(variant), tmp_path)
    dtype = jnp.float32 if variant.float32 else jnp.bfloat16
    rng = np.random.default_rng(8)
    many = rng.normal(size=(2, 6001))
    ties = rng.integers(-2, 3, (3, 601))
    masked = np.where(rng.random((3, 77)) < 0.9, -np.inf, rng.integers(-9, 9, (3, 77)))
    masked[1] = -np.inf
    masked[2, [5, 9, 60]] = np.nan, -np.nan, np.nan
    # Of these, regular samples tell nothing, and of the ties there are too many.
    regular = np.where(np.arange(16384) % 16 < 4, 9, 0) + rng.normal(size=16384)
    long = np.stack([regular, -regular, rng.normal(size=16384), rng.integers(0, 3, 16384)])
    for values, k in ((many, 300), (ties, 200), (masked, 20), (masked[:, :3], 5), (long, 1500)):
        row = values.astype(dtype)
        indices, scores = simulate_topk(library, row, k)
        wide = np.pad(row.astype(np.float64), ((0, 0), (0, k)), constant_values=-np.inf)
        best = np.lexsort((-wide, ~np.isnan(wide)), axis=1)[:, :k]
        wanted = np.take_along_axis(wide, best, 1)
        np.testing.assert_array_equal(scores.astype(np.float64), wanted)
        np.testing.assert_array_equal(indices, np.where(np.isneginf(wanted), -1, best))
