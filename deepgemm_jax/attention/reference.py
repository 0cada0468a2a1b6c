"""The indexer in plain JAX: what runs where there is no kernel, and the tests' first oracle."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core import compat

# Scores of every head are held for so many bytes' worth of queries at a time. One query's are held
# in any case: 4 · H · T bytes.
CHUNK_BYTES = 2**26


def each_of_batch(q_dims: int) -> Callable[[Callable], Callable]:
    """Takes one batch dim in front of all operands, one element after the other: memory for all at
    once is what chunks are to save."""

    def decorate(reference):
        def batched(params, q, *operands):
            if q.ndim == q_dims:
                return reference(params, q, *operands)
            return compat.each(lambda one: reference(params, *one), (q, *operands))

        return batched

    return decorate


def _chunks(rows: int, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Cuts the first dim, filled up to whole chunks: [n ...] -> [chunks rows ...]."""

    def cut(x):
        # Rows of zeros have no keys: they start and end at the first.
        x = jnp.pad(x, [(0, -x.shape[0] % rows), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(x.shape[0] // rows, rows, *x.shape[1:])

    return [cut(x) for x in arrays]


def by_rows(function: Callable, rows: int, arrays: Sequence[jax.Array]) -> Any:
    """A function of arrays' rows, which needs memory for each of them, so many rows at a time."""
    count = arrays[0].shape[0]
    if count <= rows:
        return function(*arrays)
    chunks = _chunks(max(1, rows), arrays)
    results = jax.lax.map(lambda chunk: function(*chunk), chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)


def _rows_at_once(q, kv) -> int:
    return CHUNK_BYTES // (4 * q.shape[1] * max(1, kv.shape[0]))


def relu(x):
    """NaN stays NaN, as it does not in XLA's maximum on a CPU."""
    return jnp.where(x < 0, 0, x)


def _weighted_scores(q, kv, kv_scale, weights):
    """relu(q · k) summed over the heads with their weights, scaled: [n h d], [t d] -> [n t]."""
    # bfloat16 holds every float8 exactly, and is the fastest dot where there are tensor cores.
    scores = jnp.einsum(
        "nhd,td->nht",
        q.astype(jnp.bfloat16),
        kv.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    # A product and a sum, and not a dot, which TF32 would round.
    return (relu(scores) * weights[..., None]).sum(1) * kv_scale


@each_of_batch(q_dims=3)
def fp8_mqa_logits(params, q, kv, kv_scale, weights, start, end):
    """All keys' logits of a few queries at a time, whatever their starts and ends."""
    count = kv.shape[0]

    def rows(q, weights, start, end):
        logits = _weighted_scores(q, kv, kv_scale, weights)
        keys = jnp.arange(params.columns)[None]
        if params.compressed:
            keys += jnp.clip(start, 0, count)[:, None]
            # What a column past the last key takes is one more than there are.
            padded = jnp.pad(logits, ((0, 0), (0, 1)))
            logits = jnp.take_along_axis(padded, jnp.minimum(keys, count), 1)
        if params.clean_logits:
            inside = (keys >= start[:, None]) & (keys < jnp.minimum(end, count)[:, None])
            logits = jnp.where(inside, logits, -jnp.inf)
        return logits.astype(params.logits_dtype)

    return [by_rows(rows, _rows_at_once(q, kv), (q, weights, start, end))]


_precise = functools.partial(jnp.einsum, precision="highest")


def _backward(params, kv, q, weights, start, end, gradient):
    """Of a few queries: what flows back to the products of q and kv, [n h t], to the weights,
    [n h], and q and kv themselves, but for rows that have no part in it, all in float32."""
    q, weights, gradient = (x.astype(jnp.float32) for x in (q, weights, gradient))
    keys = jnp.arange(kv.shape[0])[None]
    columns = keys
    if params.compressed:
        columns = keys - jnp.clip(start, 0, kv.shape[0])[:, None]
        gradient = jnp.take_along_axis(gradient, jnp.clip(columns, 0, params.columns - 1), 1)
    seen = (keys >= start[:, None]) & (keys < end[:, None]) & (columns < params.columns)
    gradient = jnp.where(seen, gradient, 0)[:, None]
    # NaN times 0 would be NaN.
    kv = jnp.where(seen.any(0)[:, None], kv, 0)
    q = jnp.where(seen.any(1)[:, None, None], q, 0)
    scores = jnp.where(seen[:, None], _precise("nhd,td->nht", q, kv), 0)
    through = jnp.where(scores > 0, gradient * weights[..., None], 0)
    return through, (gradient * relu(scores)).sum(2), q, kv


@each_of_batch(q_dims=3)
def mqa_logits_backward_q(params, q, kv, weights, start, end, gradient):
    """The gradients of q and weights, whose rows are the queries."""
    kv = kv.astype(jnp.float32)

    def rows(*operands):
        through, weights_gradient, _, used = _backward(params, kv, *operands)
        return _precise("nht,td->nhd", through, used), weights_gradient

    return list(by_rows(rows, _rows_at_once(q, kv), (q, weights, start, end, gradient)))


@each_of_batch(q_dims=3)
def mqa_logits_backward_kv(params, q, kv, weights, start, end, gradient):
    """The gradient of kv, summed over the queries."""
    kv = kv.astype(jnp.float32)

    def add(total, operands):
        through, _, q, _ = _backward(params, kv, *operands)
        return total + _precise("nht,nhd->td", through, q), None

    rows = min(max(1, _rows_at_once(q, kv)), max(1, q.shape[0]))
    # Varies over a mesh as the sum does.
    zero, _ = compat.vary_alike([jnp.zeros_like(kv), q])
    return [jax.lax.scan(add, zero, _chunks(rows, (q, weights, start, end, gradient)))[0]]


@each_of_batch(q_dims=4)
def fp8_paged_mqa_logits(params, q, cache, weights, context_lens, block_table):
    """One block of every sequence at a time, as many as the longest sequence has."""
    batch, next_n, _, depth = q.shape
    blocks, block_kv, _ = cache.shape
    cache = cache.reshape(blocks, -1)
    pages = min(block_table.shape[1], -(-params.columns // block_kv))
    lengths = jnp.minimum(context_lens, min(params.columns, pages * block_kv))
    # What a table holds past its sequence's end may be anything, so it is not followed.
    used = jnp.arange(pages) * block_kv < lengths.max(1, initial=0)[:, None]
    table = jnp.where(used, jnp.clip(block_table[:, :pages], 0, blocks - 1), 0)

    def page(number, logits):
        data = cache[jax.lax.dynamic_index_in_dim(table, number, 1, keepdims=False)]
        keys = jax.lax.bitcast_convert_type(data[:, : block_kv * depth], jnp.float8_e4m3fn)
        scales = jax.lax.bitcast_convert_type(
            data[:, block_kv * depth :].reshape(batch, block_kv, 4), jnp.float32
        )
        values = jax.vmap(_weighted_scores)(
            q, keys.reshape(batch, block_kv, depth), scales, weights
        )
        return jax.lax.dynamic_update_slice_in_dim(logits, values, number * block_kv, axis=2)

    # Varies over a mesh as the loop's results do.
    logits, _ = compat.vary_alike(
        [jnp.full((batch, next_n, pages * block_kv), -jnp.inf, jnp.float32), lengths]
    )
    longest = lengths.max(initial=0)
    logits = jax.lax.fori_loop(0, -(-longest // block_kv), page, logits)
    if params.clean_logits:
        positions = jnp.arange(pages * block_kv)
        logits = jnp.where(positions < lengths[..., None], logits, -jnp.inf)
    logits = logits[..., : params.columns]
    missing = params.columns - logits.shape[2]
    logits = jnp.pad(logits, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)
    return [logits.astype(params.logits_dtype)]


def indexer_topk(params, logits):
    """The k largest of each row; -1 stands for what a row does not have."""
    count = min(params.k, logits.shape[1])
    # NaN are ordered by their signs.
    logits = jnp.where(jnp.isnan(logits), jnp.nan, logits)
    scores, indices = jax.lax.top_k(logits, count)
    missing = ((0, 0), (0, params.k - count))
    scores = jnp.pad(scores, missing, constant_values=-jnp.inf)
    indices = jnp.pad(indices, missing)
    return [jnp.where(scores == -jnp.inf, -1, indices), scores]
