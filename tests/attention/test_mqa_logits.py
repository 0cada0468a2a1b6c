"""fp8_mqa_logits and clean_logits against the oracle."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import assert_small_difference, logits, random_problem
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import FLOAT8, assert_close, on_each_platform, put

import deepgemm_jax
from deepgemm_jax import ScaledArray, clean_logits, fp8_mqa_logits
from deepgemm_jax.attention import reference

DTYPES = [jnp.float32, jnp.bfloat16]


jitted = jax.jit(fp8_mqa_logits, static_argnames=("clean_logits", "max_seqlen_k", "logits_dtype"))


def check(platform, problem, **keywords):
    found = jitted(*put(problem.arguments, platform), **keywords)
    assert found.dtype == keywords.get("logits_dtype", jnp.float32)
    oracle = logits(problem, keywords.get("max_seqlen_k"))
    assert_close(found, oracle, platform)
    assert_small_difference(found, oracle)


@on_each_platform
@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    s=st.integers(0, 40),
    t=st.integers(0, 200),
    h=st.integers(1, 70),
    d=st.sampled_from([32, 64, 128]),
    width=st.none() | st.integers(1, 250),
    dtype=st.sampled_from(DTYPES),
)
@example(seed=0, s=1, t=1, h=1, d=32, width=1, dtype=jnp.float32)
@example(seed=0, s=0, t=7, h=8, d=32, width=None, dtype=jnp.float32)
@example(seed=0, s=7, t=0, h=8, d=32, width=3, dtype=jnp.float32)
@example(seed=1, s=33, t=257, h=128, d=128, width=None, dtype=jnp.bfloat16)
def test_shapes(platform, seed, s, t, h, d, width, dtype):
    problem = random_problem(seed, s, t, h, d)
    check(platform, problem, max_seqlen_k=width, logits_dtype=dtype)


@on_each_platform
@pytest.mark.parametrize("width", [None, 5, 40])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 0),
        (5, 5),
        (30, 5),
        (0, 37),
        (0, 38),
        (-4, 1000),
        (36, 37),
        (37, 40),
        (1000, 2000),
        (-(2**31), 2**31 - 1),
        (2**31 - 1, 2**31 - 1),
        (-9, -2),
    ],
)
def test_starts_and_ends(platform, start, end, width):
    problem = random_problem(0, 3, 37)
    full = functools.partial(np.full, 3, dtype=np.int32)
    problem = dataclasses.replace(problem, start=full(start), end=full(end))
    check(platform, problem, max_seqlen_k=width)


@on_each_platform
@pytest.mark.parametrize("width", [None, 40])
def test_a_few_queries_at_a_time(platform, monkeypatch, width):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 8 * 101 * 3)
    # Of a shape that no other test has: what is compiled has its chunks already.
    check(platform, random_problem(1, 20, 101), max_seqlen_k=width)


@on_each_platform
def test_nan_and_infinity_stay_where_they_are(platform):
    problem = random_problem(2, 20, 50)
    ends = {"start": np.zeros(20, np.int32), "end": np.arange(20, dtype=np.int32) * 3}
    problem = dataclasses.replace(problem, **ends)
    problem.q[7, 0, 0] = np.nan
    problem.kv[1][5] = np.inf
    problem.kv[0][11, 3] = np.nan
    problem.weights[3, 1] = np.nan
    found = np.asarray(fp8_mqa_logits(*put(problem.arguments, platform)))
    seen = np.arange(50) < ends["end"][:, None]
    assert (found[~seen] == -np.inf).all()
    strange = np.zeros((20, 50), bool)
    strange[[7, 3]] = strange[:, [5, 11]] = True
    assert np.isfinite(found[seen & ~strange]).all()
    assert np.isnan(found[[7, 3]][seen[[7, 3]]]).all()


@on_each_platform
def test_logits_that_are_not_clean(platform):
    problem = random_problem(3, 30, 70)
    oracle = logits(problem)
    q, kv, weights, start, end = put(problem.arguments, platform)
    raw = jitted(q, kv, weights, start, end, clean_logits=False)
    assert_close(jax.jit(clean_logits)(raw, start, end), oracle, platform)
    seen = np.isfinite(oracle.value)
    np.testing.assert_array_equal(
        np.asarray(raw)[seen], np.asarray(fp8_mqa_logits(q, kv, weights, start, end))[seen]
    )


@on_each_platform
def test_results_repeat_bit_for_bit(platform):
    arguments = put(random_problem(4, 65, 130).arguments, platform)
    function = jax.jit(fp8_mqa_logits)
    first = np.asarray(function(*arguments)).tobytes()
    assert all(np.asarray(function(*arguments)).tobytes() == first for _ in range(5))
    assert np.asarray(fp8_mqa_logits(*arguments)).tobytes() == first


@on_each_platform
@pytest.mark.parametrize("shared", ["", "kv", "q", "weights"])
def test_vmap(platform, shared):
    problem = random_problem(5, 9, 41, batch=(3,))

    def one(x):
        return jax.tree.map(lambda leaf: np.stack([leaf[0]] * 3), x)

    problem = dataclasses.replace(
        problem, **({shared: one(getattr(problem, shared))} if shared else {})
    )
    names = ["q", "kv", "weights", "start", "end"]
    axes = [None if name == shared else 0 for name in names]
    arguments = [
        jax.tree.map(lambda leaf: leaf[0], x) if axis is None else x
        for x, axis in zip(problem.arguments, axes, strict=True)
    ]
    function = jax.jit(jax.vmap(fp8_mqa_logits, in_axes=tuple(axes)))
    assert_close(function(*put(arguments, platform)), logits(problem), platform)


@on_each_platform
def test_nested_vmap(platform):
    problem = random_problem(6, 5, 20, batch=(2, 3))
    found = jax.vmap(jax.vmap(fp8_mqa_logits))(*put(problem.arguments, platform))
    assert_close(found, logits(problem), platform)


def test_memory_without_all_heads_scores():
    shapes = (
        jax.ShapeDtypeStruct((1024, 64, 128), FLOAT8),
        (jax.ShapeDtypeStruct((16384, 128), FLOAT8), jax.ShapeDtypeStruct((16384,), jnp.float32)),
        jax.ShapeDtypeStruct((1024, 64), jnp.float32),
        *[jax.ShapeDtypeStruct((1024,), jnp.int32)] * 2,
    )
    for keywords in ({}, {"max_seqlen_k": 128}):
        compiled = jax.jit(functools.partial(fp8_mqa_logits, **keywords)).lower(*shapes).compile()
        # All scores would take 4 GiB.
        assert compiled.memory_analysis().temp_size_in_bytes < 2**28


def test_keys_as_scaled_array():
    q, kv, *rest = random_problem(7, 5, 20).arguments
    array = ScaledArray(kv[0], kv[1][:, None])
    np.testing.assert_array_equal(fp8_mqa_logits(q, array, *rest), fp8_mqa_logits(q, kv, *rest))


def test_implementation():
    arguments = random_problem(8, 5, 20).arguments
    np.testing.assert_array_equal(
        fp8_mqa_logits(*arguments, implementation="xla"), fp8_mqa_logits(*arguments)
    )
    kernel = jax.jit(functools.partial(fp8_mqa_logits, implementation="cuda"))
    assert "custom_call @deepgemm_jax_mqa_logits" in lowered_for_cuda(kernel, arguments)
    with pytest.raises(NotImplementedError, match="fp8_mqa_logits has no kernel for cpu"):
        kernel(*arguments)


def test_many_heads_have_no_kernel():
    arguments = random_problem(9, 5, 20, h=129).arguments
    assert "custom_call @deepgemm" not in lowered_for_cuda(jax.jit(fp8_mqa_logits), arguments)
    kernel = jax.jit(functools.partial(fp8_mqa_logits, implementation="cuda"))
    with pytest.raises(NotImplementedError, match="no kernel for more than 128 heads"):
        lowered_for_cuda(kernel, arguments)


def test_a_batch_of_keys_is_one_call_of_the_kernel():
    arguments = random_problem(9, 5, 20, batch=(2,)).arguments
    text = lowered_for_cuda(jax.jit(jax.vmap(fp8_mqa_logits)), arguments)
    assert text.count("custom_call @deepgemm_jax_mqa_logits") == 1


def lowered_for_cuda(function, arguments):
    return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def array(dtype, *shape):
    return jnp.zeros(shape, dtype)


Q = array(FLOAT8, 5, 8, 64)
KV = array(FLOAT8, 9, 64), array(jnp.float32, 9)
W = array(jnp.float32, 5, 8)
I = array(jnp.int32, 5)  # noqa: E741


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "named"),
    [
        ((Q, KV[0], W, I, I), {}, TypeError, ["kv is float8_e4m3fn[9,64]", "tuple"]),
        ((Q.astype(jnp.bfloat16), KV, W, I, I), {}, TypeError, ["q has dtype bfloat16"]),
        ((Q, KV, W.astype(jnp.bfloat16), I, I), {}, TypeError, ["weights", "bfloat16", "float32"]),
        ((Q, KV, W, I.astype(jnp.int8), I), {}, TypeError, ["cu_seq_len_k_start", "int8", "int32"]),
        ((Q[0], KV, W, I, I), {}, ValueError, ["q has shape (8, 64)", "3 dimensions [s h d]"]),
        ((Q, (KV[0][0], KV[1]), W, I, I), {}, ValueError, ["kv.data", "2 dimensions [t d]"]),
        ((Q, (KV[0][0, 0], KV[1]), W, I, I), {}, ValueError, ["kv.data", "2 dimensions [t d]"]),
        ((Q, (KV[0][:, :32], KV[1]), W, I, I), {}, ValueError, ["kv.data", "(9, 32)", "(9, 64)"]),
        ((Q, (KV[0], KV[1][:8]), W, I, I), {}, ValueError, ["kv.scale", "(8,)", "(9,)"]),
        ((Q, KV, W[:, :4], I, I), {}, ValueError, ["weights", "(5, 4)", "(5, 8)"]),
        ((Q, KV, W, I, I[:3]), {}, ValueError, ["cu_seq_len_k_end", "(3,)", "(5,)"]),
        ((Q[:, :0], KV, W[:, :0], I, I), {}, ValueError, ["q has h = 0"]),
        (
            (Q[..., :48], (KV[0][:, :48], KV[1]), W, I, I),
            {},
            ValueError,
            ["q has d = 48", "32, 64 or 128"],
        ),
        ((Q, KV, W, I, I), {"max_seqlen_k": 0}, ValueError, ["max_seqlen_k is 0", "at least 1"]),
        ((Q, KV, W, I, I), {"logits_dtype": jnp.float16}, ValueError, ["logits_dtype is float16"]),
        ((Q, KV, W, I, I), {"implementation": "gpu"}, ValueError, ["implementation", "'gpu'"]),
    ],
)
def test_bad_input(arguments, keywords, error, named):
    with pytest.raises(error, match="^fp8_mqa_logits: ") as raised:
        jax.eval_shape(functools.partial(fp8_mqa_logits, **keywords), *arguments)
    for words in named:
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((I, I, I), TypeError, "logits has dtype int32"),
        ((W[0], I, I), ValueError, "2 dimensions"),
        ((W, I[:2], I), ValueError, r"cu_seq_len_k_start has shape \(2,\), wanted \(5,\)"),
        ((W, I, W[:, 0]), TypeError, "cu_seq_len_k_end has dtype float32, wanted int32"),
    ],
)
def test_bad_input_to_clean_logits(arguments, error, named):
    with pytest.raises(error, match=f"^clean_logits: .*{named}"):
        clean_logits(*arguments)


def test_derivative_says_what_to_do_instead():
    q, kv, weights, start, end = random_problem(10, 5, 20).arguments
    with pytest.raises(NotImplementedError, match="fp8_mqa_logits has no derivative.*mqa_logits"):
        jax.grad(lambda w: fp8_mqa_logits(q, kv, w, start, end).sum())(jnp.asarray(weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clean_logits_has_a_derivative(dtype):
    start, end = np.array([0, 2], np.int32), np.array([1, 9], np.int32)
    x = jnp.arange(8, dtype=dtype).reshape(2, 4)
    gradient = jax.grad(lambda x: jax.nn.logsumexp(clean_logits(x, start, end)))(x)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient > 0, np.isin(np.arange(8).reshape(2, 4), [0, 6, 7]))


@pytest.mark.parametrize(
    "name",
    [
        "clean_logits",
        "fp8_mqa_logits",
        "fp8_paged_mqa_logits",
        "get_paged_mqa_logits_metadata",
        "indexer_topk",
        "mqa_logits",
    ],
)
def test_example_of_the_docstring(name):
    (case,) = doctest.DocTestFinder(recurse=False).find(getattr(deepgemm_jax, name))
    assert doctest.DocTestRunner().run(case).failed == 0
