"""The indexer on a mesh of 2 × 4 CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracles import logits, random_problem
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import assert_close

from deepgemm_jax import (
    clean_logits,
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    indexer_topk,
    mqa_logits,
)

KINDS = [
    (AxisType.Auto, AxisType.Auto),
    (AxisType.Explicit, AxisType.Explicit),
    (AxisType.Explicit, AxisType.Auto),
]


def specs(queries, heads=None):
    return P(queries, heads), P(), P(queries, heads), P(queries), P(queries)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize(
    ("queries", "heads", "width", "needed"),
    [
        (("x", "y"), None, None, set()),
        ("x", None, 7, set()),
        (None, "y", None, {"all-reduce"}),
        ("x", "y", 7, {"all-reduce"}),
        (None, None, None, set()),
    ],
)
def test_logits(mesh, kinds, queries, heads, width, needed):
    problem = random_problem(0, 16, 33)
    with mesh(*kinds):
        operands = jax.device_put(problem.arguments, specs(queries, heads))
        compiled = (
            jax.jit(lambda *operands: fp8_mqa_logits(*operands, max_seqlen_k=width))
            .lower(*operands)
            .compile()
        )
        found = compiled(*operands)
        assert collectives(compiled) == needed
        wanted = NamedSharding(jax.sharding.get_mesh(), P(queries))
        assert found.sharding.is_equivalent_to(wanted, 2)
    assert_close(found, logits(problem, width))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_keys_that_are_divided_are_gathered(mesh, kinds):
    problem = random_problem(1, 16, 64)
    with mesh(*kinds):
        operands = jax.device_put(problem.arguments, (P("x"), P("y"), P("x"), P("x"), P("x")))
        found = jax.jit(fp8_mqa_logits)(*operands)
    assert_close(found, logits(problem))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("from_inputs", [False, True])
def test_topk(mesh, kinds, from_inputs):
    problem = random_problem(2, 16, 64)
    wanted = indexer_topk(problem.arguments, 9)
    with mesh(*kinds):
        operands = jax.device_put(problem.arguments, specs("x"))
        if not from_inputs:
            operands = fp8_mqa_logits(*operands)
        compiled = jax.jit(lambda x: indexer_topk(x, 9)).lower(operands).compile()
        assert collectives(compiled) == set()
        np.testing.assert_array_equal(compiled(operands), wanted)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_manual_mesh(mesh, kind, check_vma):
    problem = random_problem(3, 16, 64)
    oracle = logits(problem)

    def queries_and_heads(*operands):
        return jax.lax.psum(fp8_mqa_logits(*operands), "y")

    def keys(q, kv, weights, start, end):
        """As the docstring says, for keys that are divided."""
        first = jax.lax.axis_index("y") * kv[0].shape[0]
        return fp8_mqa_logits(q, kv, weights, start - first, end - first)

    def top(*operands):
        return indexer_topk(operands, 5)

    with mesh(kind):
        for function, in_specs, out in [
            (queries_and_heads, specs("x", "y"), P("x")),
            (keys, (P("x"), P("y"), P("x"), P("x"), P("x")), P("x", "y")),
            (top, specs(("x", "y")), P(("x", "y"))),
        ]:
            sharded = jax.shard_map(function, in_specs=in_specs, out_specs=out, check_vma=check_vma)
            found = jax.jit(sharded)(*jax.device_put(problem.arguments, in_specs))
            if function is top:
                np.testing.assert_array_equal(found, indexer_topk(problem.arguments, 5))
            else:
                assert_close(found, oracle)


@pytest.fixture(scope="module")
def training():
    rng = np.random.default_rng(4)
    q, kv, weights, cotangent = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((16, 8, 32), (24, 32), (16, 8), (16, 24))
    )
    ends = np.zeros(16, np.int32), np.arange(16, dtype=np.int32) + 9

    def loss(q, kv, weights, start, end, cotangent):
        logits = mqa_logits(q, kv, weights, start, end)
        return (jnp.where(logits == -jnp.inf, 0, logits) * cotangent).sum()

    operands = q, kv, weights, *ends, cotangent
    return loss, operands, jax.grad(loss, (0, 1, 2))(*operands)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize(("queries", "heads"), [("x", "y"), (("x", "y"), None), (None, "y")])
def test_gradient(mesh, kinds, queries, heads, training):
    loss, operands, wanted = training
    with mesh(*kinds):
        operands = jax.device_put(operands, (*specs(queries, heads), P(queries)))
        found = jax.jit(jax.grad(loss, (0, 1, 2)))(*operands)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gradient_of_shared_keys_on_a_manual_mesh(mesh, kind, training):
    loss, operands, wanted = training
    in_specs = *specs(("x", "y")), P(("x", "y"))
    with mesh(kind):
        sharded = jax.shard_map(
            jax.grad(loss, (0, 1, 2)),
            in_specs=in_specs,
            out_specs=(P(("x", "y")), P(), P(("x", "y"))),
        )
        found = jax.jit(sharded)(*jax.device_put(operands, in_specs))
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_paged(mesh, kinds):
    rng = np.random.default_rng(5)
    q = rng.normal(size=(8, 2, 8, 32)).astype(jnp.float8_e4m3fn)
    keys = rng.normal(size=(20, 32 * 32)).astype(jnp.float8_e4m3fn).view(np.uint8)
    scales = rng.random((20, 32)).astype(np.float32).view(np.uint8)
    cache = np.concatenate([keys, scales], 1).reshape(20, 32, 1, 36)
    weights = rng.normal(size=(16, 8)).astype(np.float32)
    lengths = rng.integers(0, 90, 8).astype(np.int32)
    table = rng.integers(0, 20, (8, 3)).astype(np.int32)
    operands = q, cache, weights, lengths, table

    def paged(*operands):
        return fp8_paged_mqa_logits(*operands, None, 96)

    wanted = paged(*operands)
    for axes in ("x", ("x", "y")):
        in_specs = P(axes), P(), P(axes), P(axes), P(axes)
        with mesh(*kinds):
            placed = jax.device_put(operands, in_specs)
            compiled = jax.jit(lambda *o: paged(*o)).lower(*placed).compile()
            found = compiled(*placed)
            assert collectives(compiled) == set()
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
            sharded = jax.shard_map(paged, in_specs=in_specs, out_specs=P(axes))
            np.testing.assert_allclose(jax.jit(sharded)(*placed), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_clean_logits(mesh, kinds):
    start, end = np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32) * 2
    x = np.random.default_rng(6).normal(size=(8, 12)).astype(np.float32)
    with mesh(*kinds):
        operands = jax.device_put((x, start, end), (P("x", "y"), P("x"), P("x")))
        found = jax.jit(clean_logits)(*operands)
    np.testing.assert_array_equal(found, clean_logits(x, start, end))
