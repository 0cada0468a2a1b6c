"""fp8_paged_mqa_logits and its schedule against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import Problem, assert_small_difference, logits, paged, random_problem
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import FLOAT8, Oracle, assert_close, on_each_platform, put

from deepgemm_jax import fp8_paged_mqa_logits, get_paged_mqa_logits_metadata


def random_sequences(seed, lengths, next_n, h, d, block_kv, max_blocks, columns, each=None):
    """The op's arguments, with a length for each query if they are given, and the oracle."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int32)
    if each is None:
        seen = lengths[:, None] + np.arange(1 - next_n, 1)
    else:
        seen = np.asarray(each, np.int32)
        lengths = seen.max(1)
    problems = [random_problem(seed + i, next_n, max(0, n), h, d) for i, n in enumerate(lengths)]
    cache, table = paged(rng, [p.kv for p in problems], block_kv, max_blocks)
    oracles = []
    for p, end in zip(problems, seen, strict=True):
        zeros = np.zeros(next_n, np.int32)
        oracles.append(logits(Problem(p.q, p.kv, p.weights, zeros, end), columns))
    arguments = (
        np.stack([p.q for p in problems]),
        cache,
        np.concatenate([p.weights for p in problems]),
        lengths if each is None else seen,
        table,
        None,
        columns,
    )
    parts = (np.concatenate([getattr(o, f) for o in oracles]) for f in ("value", "magnitude"))
    return arguments, Oracle(*parts)


def call(arguments, platform="cpu", **keywords):
    *operands, meta, columns = arguments
    function = functools.partial(
        fp8_paged_mqa_logits, schedule_meta=meta, max_context_len=columns, **keywords
    )
    return jax.jit(function)(*put(operands, platform))


@on_each_platform
@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    next_n=st.integers(1, 4),
    h=st.integers(1, 20),
    d=st.sampled_from([32, 64, 128]),
    block_kv=st.sampled_from([32, 64]),
    spare=st.integers(0, 3),
    columns=st.integers(200, 300),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
@example(
    seed=0,
    lengths=[0, 0],
    next_n=1,
    h=8,
    d=32,
    block_kv=64,
    spare=0,
    columns=200,
    dtype=jnp.float32,
)
def test_shapes(platform, seed, lengths, next_n, h, d, block_kv, spare, columns, dtype):
    pages = max(1, -(-max(lengths) // block_kv)) + spare
    arguments, oracle = random_sequences(seed, lengths, next_n, h, d, block_kv, pages, columns)
    found = call(arguments, platform, logits_dtype=dtype)
    assert found.dtype == dtype
    assert_close(found, oracle, platform)
    assert_small_difference(found, oracle)


@on_each_platform
def test_a_length_for_each_query(platform):
    each = [[3, 70, 0], [0, 0, 0], [64, 65, 1], [-5, 128, 2]]
    arguments, oracle = random_sequences(1, [0] * 4, 3, 8, 32, 64, 2, 130, each)
    assert_close(call(arguments, platform), oracle, platform)


@on_each_platform
def test_fewer_columns_than_keys(platform):
    for columns in (1, 64, 65, 100):
        arguments, oracle = random_sequences(2, [10, 150, 64], 2, 8, 32, 64, 3, columns)
        assert_close(call(arguments, platform), oracle, platform)


@on_each_platform
def test_lengths_beyond_the_table(platform):
    (q, cache, weights, lengths, table, meta, columns), oracle = random_sequences(
        3, [128, 64], 1, 8, 32, 64, 2, 200
    )
    table[1, 1] = table[1, 0]
    found = call((q, cache, weights, lengths + 1000, table, meta, columns), platform)
    assert np.isneginf(found[:, 128:]).all()
    assert_close(found[:1], Oracle(oracle.value[:1], oracle.magnitude[:1]), platform)


@on_each_platform
def test_lengths_below_zero(platform):
    (q, cache, weights, lengths, *rest), _ = random_sequences(6, [64, 64], 2, 8, 32, 64, 1, 64)
    lengths = np.array([-(2**31), -1], np.int32)
    assert np.isneginf(call((q, cache, weights, lengths, *rest), platform)).all()


@on_each_platform
def test_logits_that_are_not_clean(platform):
    arguments, oracle = random_sequences(4, [10, 150, 0], 1, 8, 32, 64, 3, 256)
    found = np.asarray(call(arguments, platform, clean_logits=False))
    seen = np.isfinite(oracle.value)
    np.testing.assert_array_equal(found[seen], np.asarray(call(arguments, platform))[seen])


@on_each_platform
def test_one_compilation_for_all_lengths_and_schedules(platform):
    (q, cache, weights, lengths, table, _, columns), oracle = random_sequences(
        5, [10, 150, 64], 1, 8, 32, 64, 3, 256
    )
    traces = []

    @jax.jit
    def step(q, cache, weights, lengths, table):
        traces.append(1)
        meta = get_paged_mqa_logits_metadata(lengths, 64, 7)
        return fp8_paged_mqa_logits(q, cache, weights, lengths, table, meta, columns)

    operands = put((q, cache, weights, lengths, table), platform)
    assert_close(step(*operands), oracle, platform)
    none = step(*operands[:3], jnp.zeros_like(operands[3]), operands[4])
    assert np.isneginf(none).all()
    assert len(traces) == 1


@on_each_platform
@pytest.mark.parametrize("shared_cache", [False, True])
def test_vmap(platform, shared_cache):
    problems = [random_sequences(6 + i, [10, 90 - i], 2, 8, 32, 32, 3, 96) for i in range(3)]
    arguments = [list(a[:5]) for a, _ in problems]
    blocks = min(a[1].shape[0] for a in arguments)
    assert all(a[1].shape[0] == blocks for a in arguments)
    stacked = [np.stack(x) for x in zip(*arguments, strict=True)]
    if shared_cache:
        stacked[4] = np.where(
            (stacked[4] >= 0) & (stacked[4] < blocks),
            stacked[4] + blocks * np.arange(3)[:, None, None].astype(np.int32),
            stacked[4],
        )
        stacked[1] = stacked[1].reshape(-1, *stacked[1].shape[2:])
    function = jax.vmap(
        lambda *operands: fp8_paged_mqa_logits(*operands, None, 96),
        in_axes=(0, None if shared_cache else 0, 0, 0, 0),
    )
    found = jax.jit(function)(*put(stacked, platform))
    for x, (_, oracle) in zip(found, problems, strict=True):
        assert_close(x, oracle, platform)


@on_each_platform
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(-3, 3000) | st.just(0), min_size=8, max_size=8),
    block_kv=st.sampled_from([32, 64]),
    sms=st.sampled_from([1, 3, 16, 40]),
)
def test_schedule_covers_every_split_once(platform, lengths, block_kv, sms):
    lengths = np.array(lengths, np.int32)
    meta = np.asarray(
        jax.jit(get_paged_mqa_logits_metadata, static_argnums=(1, 2))(
            put(lengths, platform), block_kv, sms
        )
    )
    splits = [
        (sequence, split)
        for sequence, n in enumerate(lengths)
        for split in range(-(-max(0, n) // (4 * block_kv)))
    ]
    order = [*splits, (len(lengths), 0)]
    places = [order.index(tuple(entry)) for entry in meta.tolist()]
    assert places[0] == 0 and places[-1] == len(splits)
    assert set(np.diff(places)) <= {len(splits) // sms, -(-len(splits) // sms)}


def test_implementation():
    (*operands, _, columns), _ = random_sequences(7, [10, 70], 2, 8, 32, 32, 3, 96)
    call = functools.partial(fp8_paged_mqa_logits, schedule_meta=None, max_context_len=columns)
    kernel = jax.jit(functools.partial(call, implementation="cuda"))
    text = kernel.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @deepgemm_jax_paged_mqa_logits" in text
    with pytest.raises(NotImplementedError, match="fp8_paged_mqa_logits has no kernel for cpu"):
        kernel(*operands)


Q = jnp.zeros((2, 3, 8, 64), FLOAT8)
CACHE = jnp.zeros((4, 64, 1, 68), jnp.uint8)
W = jnp.zeros((6, 8))
LENGTHS = jnp.zeros(2, jnp.int32)
TABLE = jnp.zeros((2, 5), jnp.int32)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({0: Q[0]}, ValueError, ["q has shape (3, 8, 64)", "4 dimensions [b n h d]"]),
        ({0: Q.astype(jnp.float32)}, TypeError, ["q has dtype float32", "float8_e4m3fn"]),
        ({1: CACHE[:, :, 0]}, ValueError, ["fused_kv_cache has shape (4, 64, 68)"]),
        ({1: CACHE.view(jnp.int8)}, TypeError, ["fused_kv_cache has dtype int8", "uint8"]),
        ({1: CACHE[:, :48]}, ValueError, ["blocks of 48", "32 or 64"]),
        ({1: CACHE[..., :64]}, ValueError, ["64 bytes a key, wanted 68"]),
        ({1: CACHE[:0]}, ValueError, ["fused_kv_cache has blocks = 0"]),
        ({2: W[:5]}, ValueError, ["weights has shape (5, 8), wanted (6, 8)"]),
        ({3: LENGTHS[:1]}, ValueError, ["context_lens has shape (1,)", "[b n]"]),
        (
            {3: jnp.zeros((2, 2), jnp.int32)},
            ValueError,
            ["context_lens has shape (2, 2)", "(2, 3)"],
        ),
        ({3: jnp.zeros(2)}, TypeError, ["context_lens has dtype float32", "int32"]),
        ({4: TABLE[:1]}, ValueError, ["block_table has shape (1, 5)", "(2, 5)"]),
        ({4: TABLE[:, :0]}, ValueError, ["block_table has m = 0"]),
        ({5: jnp.zeros((3, 3), jnp.int32)}, ValueError, ["schedule_meta", "[3, 3]"]),
        ({6: 0}, ValueError, ["max_context_len is 0"]),
    ],
)
def test_bad_input(change, error, named):
    arguments = dict(enumerate((Q, CACHE, W, LENGTHS, TABLE, None, 100))) | change
    with pytest.raises(error, match="^fp8_paged_mqa_logits: ") as raised:
        fp8_paged_mqa_logits(*arguments.values())
    for words in named:
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((LENGTHS, 48, 4), ValueError, "block_kv is 48"),
        ((LENGTHS, 64, 0), ValueError, "num_sms is 0"),
        ((LENGTHS.astype(jnp.float32), 64, 4), TypeError, "context_lens has dtype float32"),
        ((LENGTHS[None, None], 64, 4), ValueError, "context_lens has shape"),
    ],
)
def test_bad_input_to_the_schedule(arguments, error, named):
    with pytest.raises(error, match=f"^get_paged_mqa_logits_metadata: {named}"):
        get_paged_mqa_logits_metadata(*arguments)


def test_schedule_counts_the_longest_of_a_sequence():
    each = np.array([[300, 900, 5], [0, 0, 0], [1, 2, 256]], np.int32)
    np.testing.assert_array_equal(
        get_paged_mqa_logits_metadata(each, 64, 3),
        get_paged_mqa_logits_metadata(each.max(1), 64, 3),
    )


def test_schedule_for_all_multiprocessors():
    assert get_paged_mqa_logits_metadata(LENGTHS, 64).shape == (133, 2)
