"""k_grouped_{fp8,bf16}_gemm_{tn,nt}_contiguous against the oracles."""

import doctest
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped.cases import SIZES, any_lengths, forms, k_grouped, pick, random_array, spans
from oracles import assert_close, on_each_platform, put

M, N, K, G = 32, 48, 70, 4


@functools.cache
def jitted(form):
    return jax.jit(form.function)


def random_c(seed, *batch):
    return random_array(np.random.default_rng(seed), *batch, G, M, N, dtype=np.float32)


@on_each_platform
@k_grouped
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(platform, form, sizes, add):
    a, b = form.sum_problem(0, M, N, K)
    c = random_c(0) if add else None
    d = jitted(form)(*put((a, b, c), platform), group_sizes=np.array(sizes, np.int32))
    assert d.dtype == jnp.float32
    assert_close(d, form.expected_sums(a, b, spans(sizes, K), c), platform)
    for g, (start, end) in enumerate(spans(sizes, K)):
        if start == end:
            np.testing.assert_array_equal(d[g], c[g] if add else np.zeros((M, N)))


@on_each_platform
@any_lengths
@forms("k_grouped_bf16_gemm_tn_contiguous", "k_grouped_bf16_gemm_nt_contiguous")
def test_any_lengths(platform, form, lengths):
    a, b = form.sum_problem(9, *lengths, K)
    d = jitted(form)(*put((a, b), platform), group_sizes=np.array(SIZES[0], np.int32))
    assert_close(d, form.expected_sums(a, b, spans(SIZES[0], K)), platform)


@on_each_platform
@k_grouped
def test_every_set_of_empty_groups(platform, form):
    a, b = form.sum_problem(1, M, N, K)
    operands = put((a, b), platform)
    for present in itertools.product([0, 1], repeat=G):
        sizes = (np.array(present) * [9, 30, 1, 20]).astype(np.int32)
        d = jitted(form)(*operands, group_sizes=sizes)
        assert_close(d, form.expected_sums(a, b, spans(sizes, K)), platform)


@on_each_platform
@k_grouped
@pytest.mark.parametrize("k", [0, 400])
def test_lengths_of_k(platform, form, k):
    a, b = form.sum_problem(2, M, N, k)
    sizes = np.array([k // 3, 0, k // 2, 2], np.int32)
    c = random_c(2)
    d = form.function(*put((a, b, c), platform), group_sizes=sizes)
    assert_close(d, form.expected_sums(a, b, spans(sizes, k), c), platform)


@on_each_platform
@k_grouped
def test_bfloat16_result(platform, form):
    a, b = form.sum_problem(7, M, N, K)
    c = random_c(7).astype(jnp.bfloat16)
    sizes = np.array(SIZES[0], np.int32)
    d = form.function(
        *put((a, b, c), platform), group_sizes=sizes, preferred_element_type=jnp.bfloat16
    )
    assert d.dtype == jnp.bfloat16
    assert_close(d, form.expected_sums(a, b, spans(sizes, K), c.astype(np.float64)), platform)


@k_grouped
def test_offsets(form):
    a, b = form.sum_problem(3, M, N, K)
    for offsets, expected in [
        ([5, 6, 20, 40, 60], [(5, 6), (6, 20), (20, 40), (40, 60)]),
        ([-5, 30, 10, 40, 500], [(0, 30), (30, 30), (30, 40), (40, 70)]),
    ]:
        d = jitted(form)(a, b, group_offsets=np.array(offsets, np.int32))
        assert_close(d, form.expected_sums(a, b, expected))


@on_each_platform
@k_grouped
def test_what_is_no_group_s_stays_out(platform, form):
    a, b = form.sum_problem(4, M, N, 256)
    axis = 0 if "_tn_" in form.name else 1
    for x in (a.data, b.data) if form.fp8 else (a, b):
        x[(slice(None),) * axis + (slice(20, 30),)] = np.nan
    offsets = np.array([0, 20, 20, 20, 20], np.int32), np.array([30, 31, 50, 50, 256], np.int32)
    for each in offsets:
        d = jitted(form)(*put((a, b), platform), group_offsets=each)
        assert np.isfinite(np.asarray(d)).all()


@k_grouped
def test_sizes_are_data(form):
    a, b = form.sum_problem(5, M, N, K)
    traces = []

    @jax.jit
    def gemm(a, b, sizes):
        traces.append(sizes)
        return form.function(a, b, group_sizes=sizes)

    with jax.transfer_guard_device_to_host("disallow"):
        for sizes in SIZES:
            gemm(a, b, np.array(sizes, np.int32))
    assert len(traces) == 1


@on_each_platform
@forms("k_grouped_fp8_gemm_tn_contiguous", "k_grouped_bf16_gemm_nt_contiguous")
@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, None), (None, 0, 0, None)])
def test_vmap(platform, form, axes):
    a, b = form.sum_problem(6, M, N, K, (2,))
    c, sizes = random_c(6, 2), np.array([[20, 13, 0, 37], [0, 0, 5, 90]], np.int32)
    operands = [
        x if axis == 0 else pick(x, 0) for x, axis in zip((a, b, c, sizes), axes, strict=True)
    ]

    def gemm(a, b, c, sizes):
        return form.function(a, b, c, group_sizes=sizes)

    d = jax.jit(jax.vmap(gemm, axes))(*put(operands, platform))
    for i in range(2):
        a, b, c, sizes = (
            pick(x, i) if axis == 0 else x for x, axis in zip(operands, axes, strict=True)
        )
        assert_close(d[i], form.expected_sums(a, b, spans(sizes, K), c), platform)


@k_grouped
def test_no_preferred_element_type_is_the_default(form):
    a, b = form.sum_problem(8, 16, 16, 20)
    sizes = np.array([12, 8], np.int32)
    assert form.function(a, b, group_sizes=sizes, preferred_element_type=None).dtype == jnp.float32


@k_grouped
def test_bad_input(form):
    a, b = form.sum_problem(7, M, N, K)
    sizes = np.zeros(G, np.int32)
    for arguments, keywords, error, named in [
        ((a, b), {}, ValueError, "nothing given"),
        ((a, b), {"group_sizes": sizes, "group_offsets": sizes}, ValueError, "exactly one"),
        ((a, b), {"group_sizes": sizes[None]}, ValueError, "group_sizes has shape"),
        ((a, b), {"group_offsets": sizes[:0]}, ValueError, "one more than groups"),
        ((a, b), {"group_sizes": sizes.astype(bool)}, TypeError, "integers"),
        ((a, b, random_c(7)[1:]), {"group_sizes": sizes}, ValueError, "c has shape"),
        ((a, b, sizes), {"group_sizes": sizes}, TypeError, "c has dtype int32, wanted float32"),
    ]:
        with pytest.raises(error, match=f"^{form}: .*{named}"):
            form.function(*arguments, **keywords)
    if form.fp8:
        with pytest.raises(ValueError, match=f"^{form}: .* multiple of 16"):
            form.function(*form.sum_problem(7, 24, N, K), group_sizes=sizes)
    with pytest.raises(NotImplementedError, match="has no kernel"):
        form.function(a, b, group_sizes=sizes, implementation="cuda")


@k_grouped
def test_example_of_the_docstring(form):
    (case,) = doctest.DocTestFinder(recurse=False).find(form.function, form.name)
    assert doctest.DocTestRunner().run(case).failed == 0
