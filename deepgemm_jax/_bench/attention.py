"""The indexer's cases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .._core.device import cuda_device
from ..attention import config as configs
from ..attention import fp8_mqa_logits as prefill_op
from ..attention import fp8_paged_mqa_logits as paged_op
from ..attention import indexer_topk as topk_op
from ..runtime import Variant
from .case import Case, Program, nbytes

CHECKED_ROWS = 8
BLOCK_KV = 64


def fp8_mqa_logits(s: int, t: int, h: int, d: int, dtype: str) -> Case:
    """Query i of s sees t − s + i + 1 of t keys."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, kv = _float8(keys[0], s, h, d), _float8(keys[1], t, d)
    scale = jnp.exp(jax.random.normal(keys[2], (t,)))
    weights = jax.random.normal(keys[3], (s, h))
    start, end = jnp.zeros(s, jnp.int32), jnp.arange(t - s + 1, t + 1, dtype=jnp.int32)
    args = q, (kv, scale), weights, start, end
    op = functools.partial(prefill_op, logits_dtype=dtype)
    config = configs.choose_logits(s, h, cuda_device())
    seen = s * t - s * (s - 1) // 2
    return Case(
        program=Program(op, args),
        flops=2 * seen * h * d,
        bytes=nbytes(args) + seen * jnp.dtype(dtype).itemsize,
        peak="fp8",
        config=dataclasses.asdict(config),
        variant=_variant(configs.LOGITS_SOURCE, config),
        error=lambda result: _row_error(
            result, lambda row: _logits(q[row], kv, scale, weights[row], int(end[row]))
        ),
        others={"xla_bf16": Program(functools.partial(op, implementation="xla"), args)},
        chain=lambda calls: _chain(op, args, calls),
    )


def paged_lengths(rng: np.random.Generator, b: int, context: int) -> np.ndarray:
    """Keys of each of b sequences: 0.7 to 1.3 times `context`."""
    return rng.integers(int(0.7 * context), int(1.3 * context), b).astype(np.int32)


def fp8_paged_mqa_logits(b: int, n: int, h: int, d: int, context: int, dtype: str) -> Case:
    """b sequences of n queries each and 0.7 to 1.3 times `context` keys, in blocks of 64."""
    rng = np.random.default_rng(0)
    lengths = paged_lengths(rng, b, context)
    pages = -(-lengths // BLOCK_KV)
    table = np.zeros((b, pages.max()), np.int32)
    free = rng.permutation(pages.sum()).astype(np.int32)
    for i, last in enumerate(np.cumsum(pages)):
        table[i, : pages[i]] = free[last - pages[i] : last]
    keys = jax.random.split(jax.random.key(1), 4)
    q, kv = _float8(keys[0], b, n, h, d), _float8(keys[1], pages.sum(), BLOCK_KV, d)
    scale = jnp.exp(jax.random.normal(keys[2], (pages.sum(), BLOCK_KV)))
    weights = jax.random.normal(keys[3], (b * n, h))
    parts = [x.view(jnp.uint8).reshape(len(x), -1) for x in (kv, scale)]
    cache = jnp.concatenate(parts, 1).reshape(-1, BLOCK_KV, 1, d + 4)
    op = functools.partial(
        paged_op, schedule_meta=None, max_context_len=BLOCK_KV * pages.max(), logits_dtype=dtype
    )
    args = q, cache, weights, jnp.asarray(lengths), jnp.asarray(table)
    config = configs.choose_logits(n, h, cuda_device())
    seen = int(lengths.sum()) * n
    read = int(lengths.sum()) * (d + 4)

    def expected(row):
        blocks = table[row // n, : pages[row // n]]
        end = int(lengths[row // n]) - n + 1 + row % n
        own_kv, own_scale = (x[blocks].reshape(-1, *x.shape[2:]) for x in (kv, scale))
        return _logits(q.reshape(b * n, h, d)[row], own_kv, own_scale, weights[row], end)

    return Case(
        program=Program(op, args),
        flops=2 * seen * h * d,
        bytes=nbytes((q, weights, table)) + read + seen * jnp.dtype(dtype).itemsize,
        peak="fp8",
        config=dataclasses.asdict(config),
        variant=_variant(configs.LOGITS_SOURCE, config),
        error=lambda result: _row_error(result, expected),
        others={"xla_bf16": Program(functools.partial(op, implementation="xla"), args)},
        chain=lambda calls: _chain(op, args, calls),
    )


def indexer_topk(s: int, t: int, k: int, dtype: str) -> Case:
    """The k largest of t normal numbers, s times; XLA's is `jax.lax.top_k`."""
    logits = jax.random.normal(jax.random.key(2), (s, t), dtype)
    config = configs.TopkConfig(float32=int(logits.dtype == jnp.float32))

    def error(result):
        """The share of the indices, in a sample of the rows, that are not XLA's."""
        rows = _some_rows(s)
        _, wanted = jax.lax.top_k(logits[rows], k)
        return float((result[0][rows] != wanted).mean())

    return Case(
        program=Program(functools.partial(topk_op, k=k, return_scores=True), (logits,)),
        flops=0,
        bytes=nbytes(logits) + s * k * (4 + logits.dtype.itemsize),
        peak="fp8",
        config=dataclasses.asdict(config),
        variant=_variant(configs.TOPK_SOURCE, config),
        error=error,
        others={"xla": Program(functools.partial(jax.lax.top_k, k=k), (logits,))},
    )


def _float8(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16).astype(jnp.float8_e4m3fn)


def _variant(source: str, config: configs.LogitsConfig | configs.TopkConfig) -> Variant:
    return Variant(source, dataclasses.astuple(config), cuda_device().arch)


def _chain(op: Callable, args: tuple, calls: int) -> Program:
    """Calls that XLA cannot merge: each has other weights."""
    q, keys, weights, *rest = args
    return Program(
        lambda q, keys, many, *rest: [op(q, keys, weights, *rest) for weights in many],
        (q, keys, [weights + i for i in range(calls)], *rest),
    )


def _logits(
    q: jax.Array, kv: jax.Array, scale: jax.Array, weights: jax.Array, end: int
) -> np.ndarray:
    """One query's, in float64, of the keys that it sees."""
    arrays = (np.asarray(x).astype(np.float64) for x in (q, kv[:end], scale[:end], weights))
    heads, keys, scales, head_weights = arrays
    return np.maximum(keys @ heads.T, 0) @ head_weights * scales


def _some_rows(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, CHECKED_ROWS).astype(int))


def _row_error(result: jax.Array, expected: Callable[[int], np.ndarray]) -> float:
    """The largest error in a row over the row's root mean square, in a sample of the rows;
    infinite if the mask is not exact.

    Of each error the half of a unit in the last place is taken off that rounding to the result's
    dtype may add. In bfloat16 that would be all there is to be seen: the largest of 65,536 logits,
    whose keys' scales are log-normal, is 50 times the root mean square.
    """
    errors = []
    for row in _some_rows(len(result)):
        wanted = expected(int(row))
        found = np.asarray(result[row])
        if not np.isneginf(found[len(wanted) :].astype(np.float64)).all():
            return float("inf")
        seen = found[: len(wanted)]
        rounding = np.spacing(np.abs(seen)).astype(np.float64) / 2
        error = (np.abs(seen.astype(np.float64) - wanted) - rounding).max()
        errors.append(max(error, 0) / np.sqrt(np.mean(wanted**2)))
    return float(max(errors))
