"""indexer_topk against a stable sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import FLOAT8, on_each_platform, put

from deepgemm_jax import fp8_mqa_logits, indexer_topk
from deepgemm_jax.attention import op


def best(logits, k):
    """The k largest, NaN first, equal ones in order, 0 before -0; -1 where there is none."""
    logits = np.asarray(logits, np.float64)
    wide = np.pad(logits, ((0, 0), (0, k)), constant_values=-np.inf)
    nan = np.isnan(wide)
    indices = np.lexsort((np.signbit(wide) & ~nan, -wide, ~nan), axis=1)[:, :k]
    scores = np.take_along_axis(wide, indices, 1)
    return np.where(np.isneginf(scores), -1, indices), scores


def check(found, logits, k):
    for x, wanted in zip(found, best(logits, k), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float64), wanted)


@on_each_platform
@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    s=st.integers(0, 9),
    t=st.integers(0, 300),
    k=st.integers(1, 320),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_of_logits(platform, seed, s, t, k, dtype):
    rng = np.random.default_rng(seed)
    # Few values, so that many are equal.
    logits = np.where(rng.random((s, t)) < 0.5, -np.inf, rng.integers(-9, 9, (s, t))).astype(dtype)
    signs = rng.choice([-1.0, 1.0], (s, t)).astype(dtype)
    logits = np.where(rng.random((s, t)) < 0.02, np.copysign(dtype(np.nan), signs), logits)
    top = jax.jit(functools.partial(indexer_topk, k=k, return_scores=True))
    indices, scores = top(put(logits, platform))
    assert indices.dtype == jnp.int32 and scores.dtype == dtype
    check((indices, scores), logits, k)
    np.testing.assert_array_equal(indexer_topk(put(logits, platform), k), indices)


@on_each_platform
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("k", [1, 2048])
def test_of_many_keys(platform, dtype, k):
    """Whatever a part of a row may lead one to think of all of it."""
    rng = np.random.default_rng(0)
    t = 16384
    normal, place = rng.normal(size=t), np.arange(t)
    rows = [
        normal,
        np.sort(normal),
        rng.integers(-2, 3, t),
        np.where(place % 16 < 4, 9, 0) + normal,
        np.where(place % 16 < 4, 0, 9) + normal,
        np.where(place < 3000, normal, -np.inf),
        np.where(place % 1000 == 7, normal, -np.inf),
        np.full(t, -np.inf),
    ]
    for columns in (t, 5001):
        logits = np.stack(rows)[:, :columns].astype(dtype)
        check(indexer_topk(put(logits, platform), k, return_scores=True), logits, k)


@on_each_platform
@pytest.mark.parametrize("chunk", [op.CHUNK_BYTES, 4 * 50 * 3, 1])
@pytest.mark.parametrize("k", [1, 20, 70])
def test_of_inputs(platform, monkeypatch, chunk, k):
    monkeypatch.setattr(op, "CHUNK_BYTES", chunk)
    rng = np.random.default_rng(1)
    *_, start, end = random_problem(1, 16, 50).arguments
    # Small integers and powers of two, whose logits are exact in whatever order they are summed.
    q, keys, weights = (rng.integers(-4, 5, shape) for shape in ((16, 8, 32), (50, 32), (16, 8)))
    kv = keys.astype(FLOAT8), np.exp2(rng.integers(-2, 3, 50)).astype(np.float32)
    arguments = put((q.astype(FLOAT8), kv, weights.astype(np.float32), start, end), platform)
    top = jax.jit(lambda arguments: indexer_topk(arguments, k, return_scores=True))
    check(top(arguments), fp8_mqa_logits(*arguments), k)


@on_each_platform
@pytest.mark.parametrize("axes", [(0, 0, 0, 0, 0), (0, None, 0, 0, 0), (None, 0, None, None, None)])
def test_vmap(platform, axes):
    arguments = random_problem(2, 6, 30, batch=(3,)).arguments
    arguments = tuple(
        x if axis == 0 else jax.tree.map(lambda leaf: leaf[0], x)
        for x, axis in zip(arguments, axes, strict=True)
    )
    arguments = put(arguments, platform)
    top = jax.vmap(lambda *arguments: indexer_topk(arguments, 8), in_axes=axes)
    logits = jax.vmap(fp8_mqa_logits, in_axes=axes)(*arguments)
    found = jax.jit(top)(*arguments)
    np.testing.assert_array_equal(found, jax.vmap(lambda x: indexer_topk(x, 8))(logits))
    for x, one in zip(found, logits, strict=True):
        np.testing.assert_array_equal(x, best(one, 8)[0])


def test_memory():
    """At most 1 GiB beside inputs and outputs, where logits alone would take 2."""
    s, t, h, d = 4096, 131072, 64, 128
    arguments = (
        jax.ShapeDtypeStruct((s, h, d), FLOAT8),
        (jax.ShapeDtypeStruct((t, d), FLOAT8), jax.ShapeDtypeStruct((t,), jnp.float32)),
        jax.ShapeDtypeStruct((s, h), jnp.float32),
        *[jax.ShapeDtypeStruct((s,), jnp.int32)] * 2,
    )
    compiled = jax.jit(lambda *arguments: indexer_topk(arguments, 2048)).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**30


X = jnp.zeros((3, 9))
INPUTS = (
    jnp.zeros((3, 8, 32), FLOAT8),
    (jnp.zeros((9, 32), FLOAT8), jnp.zeros(9)),
    jnp.zeros((3, 8)),
    jnp.zeros(3, jnp.int32),
    jnp.zeros(3, jnp.int32),
)


@pytest.mark.parametrize(
    ("logits", "k", "keywords", "error", "named"),
    [
        (X, 0, {}, ValueError, "k is 0, wanted 1 to 2048"),
        (X, 2049, {}, ValueError, "k is 2049"),
        (X[0], 4, {}, ValueError, r"logits has shape \(9,\), wanted 2 dimensions"),
        (X.astype(jnp.float16), 4, {}, TypeError, "logits has dtype float16"),
        (INPUTS[:4], 4, {}, TypeError, "got a tuple of 4, wanted logits or 5 operands"),
        ((INPUTS[0], X, *INPUTS[2:]), 4, {}, TypeError, "kv is float32.*tuple"),
        ((INPUTS[0][0], *INPUTS[1:]), 4, {}, ValueError, r"q has shape \(8, 32\)"),
        ((*INPUTS[:4], INPUTS[4][:2]), 4, {}, ValueError, "cu_seq_len_k_end has shape"),
        (X, 4, {"implementation": "gpu"}, ValueError, "implementation is 'gpu'"),
    ],
)
def test_bad_input(logits, k, keywords, error, named):
    with pytest.raises(error, match=f"^indexer_topk: {named}"):
        indexer_topk(logits, k, **keywords)


def test_derivative_says_what_to_do_instead():
    def loss(x):
        return indexer_topk(x, 2, return_scores=True)[1].sum()

    with pytest.raises(NotImplementedError, match="indexer_topk has no derivative.*take_along"):
        jax.grad(loss)(X)


@pytest.mark.parametrize(("logits", "kernels"), [(X, ["topk"]), (INPUTS, ["mqa_logits", "topk"])])
def test_implementation(logits, kernels):
    kernel = jax.jit(lambda x: indexer_topk(x, 4, implementation="cuda"))
    text = kernel.trace(logits).lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"custom_call @deepgemm_jax_{name}" in text for name in kernels)
    with pytest.raises(NotImplementedError, match="has no kernel for cpu"):
        kernel(logits)
