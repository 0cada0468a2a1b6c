"""mqa_logits: what it gives, and its gradient, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import difference, on_each_platform, put

from deepgemm_jax import fp8_mqa_logits, mqa_logits
from deepgemm_jax.attention import reference


def random_operands(seed, s, t, h=8, d=32, dtype=np.float32, batch=()):
    rng = np.random.default_rng(seed)
    q, kv, weights = (
        np.asarray(rng.normal(size=(*batch, *shape)), dtype)
        for shape in ((s, h, d), (t, d), (s, h))
    )
    start = rng.integers(-3, t // 2, (*batch, s)).astype(np.int32)
    end = start + rng.integers(0, t + 2, (*batch, s)).astype(np.int32)
    return q, kv, weights, start, end


def columns(start, end, t, width):
    """The column of every key, and whether the query sees it there."""
    keys = np.arange(t)
    left = np.zeros_like(start) if width is None else np.maximum(start, 0)
    place = keys - left[..., None]
    seen = (keys >= start[..., None]) & (keys < end[..., None])
    return place, seen & (place < (t if width is None else width))


def gradients(operands, cotangent, width):
    """Of the sum of the logits times the cotangent, in float64."""
    *floats, start, end = operands
    q, kv, weights = (np.asarray(x, np.float64) for x in floats)
    place, seen = columns(start, end, len(kv), width)
    g = np.take_along_axis(np.asarray(cotangent, np.float64), np.where(seen, place, 0), 1) * seen
    scores = np.einsum("shd,td->sht", q, kv)
    through = (scores > 0) * g[:, None] * weights[..., None]
    return (
        np.einsum("sht,td->shd", through, kv),
        np.einsum("sht,shd->td", through, q),
        np.einsum("sht,st->sh", np.maximum(scores, 0), g),
    )


def close(found, wanted, dtype=np.float32):
    tolerance = {np.dtype(np.float32): 1e-5}.get(np.dtype(dtype), 1e-2)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), wanted, tolerance, tolerance * abs(wanted).max(initial=1e-30)
    )


@on_each_platform
@pytest.mark.parametrize("width", [None, 4, 30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("s", "t", "h", "d"), [(7, 25, 8, 32), (1, 1, 1, 128), (0, 5, 2, 32)])
def test_gradient(platform, s, t, h, d, dtype, width):
    operands = random_operands(0, s, t, h, d, dtype)
    shape = (s, t if width is None else width)
    cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    cotangent = cotangent.astype(dtype)

    @jax.jit
    def pull(operands, cotangent):
        *floats, start, end = operands
        logits, back = jax.vjp(
            lambda *floats: mqa_logits(*floats, start, end, max_seqlen_k=width, logits_dtype=dtype),
            *floats,
        )
        return back(cotangent)

    found = pull(*put((operands, cotangent), platform))
    for x, wanted in zip(found, gradients(operands, cotangent, width), strict=True):
        assert x.dtype == dtype
        close(x, wanted, dtype)


@on_each_platform
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_is_of_what_is_quantised(platform, dtype):
    operands = random_operands(2, 40, 100, 16, 64, dtype)
    q, kv, weights, start, end = (np.asarray(x, np.float64) for x in operands)
    _, seen = columns(operands[3], operands[4], 100, None)
    wanted = (np.maximum(np.einsum("shd,td->sht", q, kv), 0) * weights[..., None]).sum(1)
    found = np.asarray(jax.jit(mqa_logits)(*put(operands, platform)))
    np.testing.assert_array_equal(np.isfinite(found), seen)
    assert difference(found[seen], wanted[seen]) < 1e-3


@on_each_platform
@pytest.mark.parametrize("width", [None, 9])
def test_a_few_queries_at_a_time(platform, monkeypatch, width):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 8 * 21 * 3)
    q, kv, weights, start, end = random_operands(8, 10, 21)
    cotangent = np.ones((10, width or 21), np.float32)

    def back(q, kv, weights):
        logits = functools.partial(mqa_logits, max_seqlen_k=width)
        return jax.vjp(lambda *floats: logits(*floats, start, end), q, kv, weights)[1](cotangent)

    found = jax.jit(back)(*put((q, kv, weights), platform))
    for x, wanted in zip(
        found, gradients((q, kv, weights, start, end), cotangent, width), strict=True
    ):
        close(x, wanted)


def test_float8_operands_are_exact():
    """What e4m3 holds, with 448 in every row, comes out as fp8_mqa_logits has it."""
    q, kv, weights, start, end = random_operands(3, 10, 30)
    q, kv = (np.clip(x * 100, -448, 448).astype(jnp.float8_e4m3fn) for x in (q, kv))
    q[..., 0] = kv[..., 0] = 448
    found = mqa_logits(q.astype(np.float32), kv.astype(np.float32), weights, start, end)
    wanted = fp8_mqa_logits(q, (kv, np.ones(30, np.float32)), weights, start, end)
    np.testing.assert_array_equal(found, wanted)


def test_rows_of_zeros_and_cotangents_that_do_not_count():
    q, kv, weights, start, end = random_operands(4, 10, 30)
    q[2], kv[5] = 0, 0
    found = mqa_logits(q, kv, weights, start, end)
    assert not np.isnan(found).any()
    _, seen = columns(start, end, 30, None)
    cotangent = np.where(seen, 1, np.nan).astype(np.float32)
    _, back = jax.vjp(lambda *floats: mqa_logits(*floats, start, end), q, kv, weights)
    for x, wanted in zip(
        back(cotangent), gradients((q, kv, weights, start, end), seen, None), strict=True
    ):
        close(x, wanted)


def test_what_nobody_sees_does_no_harm():
    """NaN in keys that no query sees, and in queries that see no key."""
    q, kv, weights, start, end = random_operands(8, 5, 9)
    start, end = np.array([0, 2, 4, 0, 3]), np.array([4, 6, 4, 7, 7])
    cotangent = np.ones((5, 9), np.float32)
    wanted = gradients((q, kv, weights, start, end), cotangent, None)
    q[2], kv[7:] = np.nan, np.nan

    def total(*floats):
        return (mqa_logits(*floats, start, end, clean_logits=False) * cotangent)[
            [0, 1, 3, 4], :7
        ].sum()

    for found, x in zip(jax.grad(total, (0, 1, 2))(q, kv, weights), wanted, strict=True):
        close(found, x)


def test_in_64_bits():
    operands = random_operands(10, 5, 9)
    gradient = jax.grad(lambda *x: mqa_logits(*x, clean_logits=False).sum(), (0, 1, 2))
    wanted = gradient(*operands)
    with jax.enable_x64(True):
        found = gradient(*operands)
    for x, x_wanted in zip(found, wanted, strict=True):
        assert x.dtype == jnp.float32
        close(x, np.asarray(x_wanted))


def test_no_keys():
    q, kv, weights, start, end = random_operands(9, 5, 0)
    dq = jax.grad(lambda q: mqa_logits(q, kv, weights, start, end).sum())(q)
    assert dq.shape == q.shape and not dq.any()


def test_loss_of_an_indexer():
    """The cross entropy of a target and the softmax of the logits, by finite differences."""
    q, kv, weights, _, _ = random_operands(5, 6, 20)
    start, end = np.zeros(6, np.int32), np.full(6, 20, np.int32)
    target = np.random.default_rng(0).dirichlet(np.ones(20), 6)

    def loss(kv):
        logits = mqa_logits(q, kv, weights, start, end) / 100
        return -(target * jax.nn.log_softmax(logits)).sum()

    def float_loss(kv):
        logits = (np.maximum(np.einsum("shd,td->sht", q, kv), 0) * weights[..., None]).sum(1) / 100
        return -(target * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum()

    direction = np.random.default_rng(1).normal(size=kv.shape)
    slope = (float_loss(kv + 1e-6 * direction) - float_loss(kv - 1e-6 * direction)) / 2e-6
    found = (np.asarray(jax.jit(jax.grad(loss))(kv)) * direction).sum()
    np.testing.assert_allclose(found, slope, rtol=0.05)


@on_each_platform
def test_vmap_and_remat(platform):
    q, kv, weights, start, end = random_operands(6, 5, 20, batch=(3,))

    @jax.checkpoint
    def value(q, kv, weights, start, end):
        logits = mqa_logits(q, kv, weights, start, end)
        return jnp.where(jnp.isfinite(logits), logits, 0).sum()

    def total(q, kv, weights):
        return jax.vmap(value)(q, kv, weights, *put((start, end), platform)).sum()

    found = jax.jit(jax.grad(total, (0, 1, 2)))(*put((q, kv, weights), platform))
    for i in range(3):
        one = q[i], kv[i], weights[i], start[i], end[i]
        for x, wanted in zip(found, gradients(one, np.ones((5, 20)), None), strict=True):
            close(x[i], wanted)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({0: jnp.zeros((5, 8, 32), jnp.float8_e4m3fn)}, TypeError, "q has dtype float8_e4m3fn"),
        ({1: jnp.zeros((9, 32), jnp.int32)}, TypeError, "kv has dtype int32"),
        ({2: jnp.zeros((5,))}, ValueError, r"weights has shape \(5,\), wanted 2 dim.* \[s h\]"),
        ({1: jnp.zeros((9, 64))}, ValueError, r"kv.data has shape \(9, 64\), wanted \(9, 32\)"),
        ({3: jnp.zeros(4, jnp.int32)}, ValueError, r"cu_seq_len_k_start has shape \(4,\)"),
    ],
)
def test_bad_input(change, error, named):
    operands = dict(enumerate(random_operands(7, 5, 9)))
    with pytest.raises(error, match=f"^mqa_logits: {named}"):
        jax.eval_shape(mqa_logits, *(operands | change).values())
