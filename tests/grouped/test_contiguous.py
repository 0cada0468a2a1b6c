"""m_grouped_{fp8,bf16}_gemm_{nt,nn}_contiguous against the oracles."""

import doctest
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped.cases import (
    SIZES,
    Form,
    any_lengths,
    contiguous,
    every_recipe,
    forms,
    ids,
    pick,
    plain,
    scaled,
    spans,
    swap,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracles import FLOAT8, assert_close, on_each_platform, put

from deepgemm_jax import m_grouped_bf16_gemm_nn_contiguous

M, N, K, G = 70, 136, 144, 4

# Where both recipes and both layouts are what matters, and not each with each.
two = forms("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_bf16_gemm_nn_contiguous")


@functools.cache
def jitted(form: Form, dtype=jnp.bfloat16):
    return jax.jit(functools.partial(form.function, preferred_element_type=dtype))


def offsets(sizes):
    return np.cumsum([0, *sizes]).astype(np.int32)


@on_each_platform
@contiguous
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(platform, form, sizes):
    a, b = form.problem(0, M, N, K, G)
    d = jitted(form)(*put((a, b), platform), group_sizes=np.array(sizes, np.int32))
    assert_close(d, form.expected(a, b, ids(sizes, M)), platform)


@on_each_platform
@contiguous
def test_every_set_of_empty_groups(platform, form):
    a, b = form.problem(1, M, N, K, G)
    operands = put((a, b), platform)
    for present in itertools.product([0, 1], repeat=G):
        sizes = np.array(present, np.int32) * [9, 30, 1, 20]
        d = jitted(form)(*operands, group_sizes=sizes.astype(np.int32))
        assert_close(d, form.expected(a, b, ids(sizes, M)), platform)


@on_each_platform
@contiguous
def test_indices_in_any_order_and_out_of_range(platform, form):
    a, b = form.problem(2, M, N, K, G)
    indices = np.random.default_rng(0).integers(-2, G + 2, M).astype(np.int32)
    indices[:2] = 2**31 - 1, -(2**31)
    d = jitted(form)(*put((a, b), platform), m_indices=indices)
    assert_close(d, form.expected(a, b, indices), platform)


@on_each_platform
@contiguous
def test_offsets(platform, form):
    a, b = form.problem(3, M, N, K, G)
    for given_, expected in [
        ([0, 10, 10, 40, 70], [0] * 10 + [2] * 30 + [3] * 30),
        ([5, 6, 20, 40, 60], [-1] * 5 + [0] + [1] * 14 + [2] * 20 + [3] * 20 + [-1] * 10),
        ([0, 30, 10, 40, 500], [0] * 30 + [2] * 10 + [3] * 30),
        ([-7, -3, 5, 2**31 - 1, 3], [1] * 5 + [2] * 65),
    ]:
        d = jitted(form)(*put((a, b), platform), group_offsets=np.array(given_, np.int32))
        assert_close(d, form.expected(a, b, expected), platform)


@on_each_platform
@every_recipe
@pytest.mark.parametrize("layout", ["nt", "nn"])
@pytest.mark.parametrize("dtypes", [(FLOAT8, FLOAT8), (jnp.float8_e5m2, FLOAT8)], ids=str)
def test_recipes(platform, recipe, of_a, of_b, layout, dtypes):
    rng = np.random.default_rng(0)
    a, b = scaled(rng, dtypes[0], of_a, M, K), scaled(rng, dtypes[1], of_b, G, N, K)
    sizes = np.array([20, 0, 33, 5], np.int32)
    function = Form(f"m_grouped_fp8_gemm_{layout}_contiguous").function
    d = jax.jit(functools.partial(function, recipe=recipe))(
        *put((a, b if layout == "nt" else swap(b)), platform), group_sizes=sizes
    )
    a64, b64 = (np.asarray(x.dequantize(), np.float64) for x in (a, b))
    for g, (start, end) in enumerate(spans(sizes, M)):
        assert_close(d[start:end], plain(a64[start:end], b64[g]), platform)
    assert not np.asarray(d[58:], np.float32).any()


@on_each_platform
@any_lengths
@forms("m_grouped_bf16_gemm_nt_contiguous", "m_grouped_bf16_gemm_nn_contiguous")
def test_any_lengths(platform, form, lengths):
    a, b = form.problem(13, M, *lengths, G)
    d = jitted(form)(*put((a, b), platform), group_sizes=np.array(SIZES[0], np.int32))
    assert_close(d, form.expected(a, b, ids(SIZES[0], M)), platform)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int64])
def test_spellings_and_integers_agree(dtype):
    form = Form("m_grouped_bf16_gemm_nt_contiguous")
    a, b = form.problem(4, M, N, K, G)
    sizes = np.array([20, 0, 33, 5], dtype)
    expected = form.expected(a, b, ids(sizes, M))
    rows = np.where(ids(sizes, M) < 0, G, ids(sizes, M)).astype(dtype)
    for spelling in (
        {"group_sizes": sizes},
        {"group_offsets": offsets(sizes).astype(dtype)},
        {"m_indices": rows},
    ):
        assert_close(form.function(a, b, **spelling), expected)


def test_sizes_wider_than_their_dtype_holds_rows():
    form = Form("m_grouped_bf16_gemm_nt_contiguous")
    a, b = form.problem(5, 300, 16, 16, 3)
    sizes = np.array([100, 127, -1], np.int8)
    assert_close(form.function(a, b, group_sizes=sizes), form.expected(a, b, ids(sizes, 300)))


@on_each_platform
@settings(deadline=None, max_examples=5)
@given(
    name=st.sampled_from(
        [f"m_grouped_{t}_gemm_{x}_contiguous" for t in ("fp8", "bf16") for x in ("nt", "nn")]
    ),
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 40).map(lambda n: 8 * n),
    k=st.integers(1, 24).map(lambda k: 16 * k),
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    more=st.integers(-20, 20),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float32]),
)
@example(
    name="m_grouped_fp8_gemm_nt_contiguous",
    seed=0,
    n=16,
    k=16,
    sizes=[0],
    more=0,
    dtype=jnp.float32,
)
@example(
    name="m_grouped_fp8_gemm_nt_contiguous",
    seed=1,
    n=37,
    k=48,
    sizes=[3, 0, 90],
    more=20,
    dtype=jnp.bfloat16,
)
def test_shapes(platform, name, seed, n, k, sizes, more, dtype):
    form, m = Form(name), max(0, sum(sizes) + more)
    a, b = form.problem(seed, m, n, k, len(sizes))
    d = jitted(form, dtype)(*put((a, b), platform), group_sizes=np.array(sizes, np.int32))
    assert d.dtype == dtype
    assert_close(d, form.expected(a, b, ids(sizes, m)), platform)


@on_each_platform
def test_many_groups(platform):
    form = Form("m_grouped_fp8_gemm_nt_contiguous")
    rng = np.random.default_rng(6)
    sizes = (rng.zipf(1.5, 512).clip(0, 40) * (rng.random(512) > 0.5)).astype(np.int32)
    m = int(sizes.sum()) + 3
    a, b = form.problem(6, m, 16, 32, 512)
    d = jitted(form)(*put((a, b), platform), group_sizes=sizes)
    assert_close(d, form.expected(a, b, ids(sizes, m)), platform)


@on_each_platform
@contiguous
def test_what_is_no_group_s_stays_out(platform, form):
    """NaN in padding, and in the matrices of groups with no rows, is nobody's."""
    a, b = form.problem(7, M, N, K, G)
    sizes = np.array([20, 0, 33, 5], np.int32)
    for leaf in jax.tree.leaves(a):
        leaf[58:] = np.nan
    for leaf in jax.tree.leaves(b):
        leaf[1] = np.nan
    d = jitted(form)(*put((a, b), platform), group_sizes=sizes)
    assert not np.asarray(d[58:], np.float32).any()
    assert np.isfinite(np.asarray(d, np.float32)).all()


@two
def test_sizes_are_data(form):
    a, b = form.problem(8, M, N, K, G)
    traces = []

    @jax.jit
    def gemm(a, b, sizes):
        traces.append(sizes)
        return form.function(a, b, group_sizes=sizes)

    with jax.transfer_guard_device_to_host("disallow"):
        for sizes in SIZES:
            gemm(a, b, np.array(sizes, np.int32))
    assert len(traces) == 1


@two
def test_results_repeat_bit_for_bit(form):
    a, b = form.problem(9, M, N, K, G)
    sizes = np.array(SIZES[0], np.int32)
    first = np.asarray(jitted(form)(a, b, group_sizes=sizes)).tobytes()
    assert np.asarray(jitted(form)(a, b, group_sizes=sizes)).tobytes() == first
    xla = jax.jit(functools.partial(form.function, implementation="xla"))
    assert np.asarray(xla(a, b, group_sizes=sizes)).tobytes() == first


@two
def test_groups_in_order_need_ids_only_where_rows_are_divided_or_batched(mesh, form):
    def by_sizes(a, b, sizes):
        return form.function(a, b, group_sizes=sizes)

    def by_id(function, *operands):
        program = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"by_id = (\w+)", program)

    a, b = form.problem(10, M, N, K, G)
    sizes = np.array(SIZES[0], np.int32)
    assert by_id(by_sizes, a, b, sizes) == ["false"]
    several = jax.tree.map(lambda x: np.stack([x, x]), (a, sizes))
    assert by_id(jax.vmap(by_sizes, (0, None, 0)), several[0], b, several[1]) == ["true"]
    with mesh(AxisType.Explicit):
        a = jax.tree.map(lambda x: jax.device_put(x, P("x")), a)
        assert by_id(by_sizes, a, b, sizes) == ["true"]


@on_each_platform
@two
@pytest.mark.parametrize("axes", [(0, None, 0), (0, 0, 0), (None, 0, None)])
def test_vmap(platform, form, axes):
    batch = 3
    a, b = form.problem(10, 40, 128, 144, G, (batch,))
    sizes = np.array([[20, 13, 0, 7], [0, 0, 5, 60], [1, 2, 3, 4]], np.int32)
    operands = [x if axis == 0 else pick(x, 0) for x, axis in zip((a, b, sizes), axes, strict=True)]

    def gemm(a, b, sizes):
        return form.function(a, b, group_sizes=sizes)

    d = jax.jit(jax.vmap(gemm, axes))(*put(operands, platform))
    for i in range(batch):
        a, b, sizes = (
            pick(x, i) if axis == 0 else x for x, axis in zip(operands, axes, strict=True)
        )
        assert_close(d[i], form.expected(a, b, ids(sizes, 40)), platform)


def test_vmap_of_rows_makes_no_copies_of_the_matrices():
    form = Form("m_grouped_bf16_gemm_nt_contiguous")
    a, b = form.problem(11, 24, 16, 16, 64, (10,))

    def gemm(a, b, sizes):
        return form.function(a, b, group_sizes=sizes)

    text = jax.jit(jax.vmap(gemm, (0, None, None))).lower(a, b[0], np.zeros(64, np.int32)).as_text()
    assert "tensor<240x16xbf16>" in text  # all rows as one matrix
    assert "10x64x16x16" not in text


def array(dtype, *shape):
    return jnp.zeros(shape, dtype)


A = array(FLOAT8, 5, 256), array(jnp.float32, 5, 2)
B = array(FLOAT8, 3, 300, 256), array(jnp.float32, 3, 3, 2)
SIZES_OF_3 = {"group_sizes": np.zeros(3, np.int32)}
NAME = "m_grouped_fp8_gemm_nt_contiguous"


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "named"),
    [
        ((A, B), {}, ValueError, ["nothing", "exactly one of m_indices, group_sizes"]),
        (
            (A, B),
            {**SIZES_OF_3, "m_indices": np.zeros(5, np.int32)},
            ValueError,
            ["m_indices and group_sizes", "exactly one"],
        ),
        ((A, B), {"group_sizes": np.zeros(4, np.int32)}, ValueError, ["group_sizes", "(4,)"]),
        ((A, B), {"group_sizes": np.zeros(3)}, TypeError, ["group_sizes", "float", "integers"]),
        ((A, B), {"m_indices": np.zeros(3, np.int32)}, ValueError, ["m_indices", "(5,)"]),
        ((A, B), {"group_offsets": np.zeros(3, np.int32)}, ValueError, ["offsets", "(4,)"]),
        ((array(jnp.float32, 5, 256), B), SIZES_OF_3, TypeError, ["a is float32[5,256]"]),
        ((A, (B[0][:, :, :128], B[1])), SIZES_OF_3, ValueError, ["b.data", "(3, 300, 256)"]),
        ((A, (B[0], B[1][:, :2])), SIZES_OF_3, ValueError, ["b.scale", "(3, 3, 2)"]),
        ((A, (B[0][0], B[1][0])), {"m_indices": np.zeros(5, int)}, ValueError, ["b.data", "g n k"]),
        ((A, B), {**SIZES_OF_3, "preferred_element_type": jnp.int8}, ValueError, ["int8"]),
        ((A, B), {**SIZES_OF_3, "implementation": "gpu"}, ValueError, ["'gpu'"]),
        ((A, B), {**SIZES_OF_3, "recipe": (1, 1, 128)}, ValueError, ["(5, 2) and (3, 300, 2)"]),
        ((A, B), {**SIZES_OF_3, "recipe": (2, 2, 2)}, ValueError, ["recipe is (2, 2, 2)"]),
        (
            (A, (B[0], B[1][:, :2])),
            {**SIZES_OF_3, "recipe": (1, 1, 0)},
            ValueError,
            ["(5, 2) and (3, 2, 2)", "(5, 1) or (1, 1) and (3, 300, 1) or (3, 1, 1)"],
        ),
    ],
)
def test_bad_input(arguments, keywords, error, named):
    with pytest.raises(error, match=f"^{NAME}: ") as raised:
        jax.eval_shape(lambda *xs: Form(NAME).function(*xs, **keywords), *arguments)
    for words in named:
        assert words in str(raised.value)


@contiguous
def test_no_preferred_element_type_is_the_default(form):
    a, b = form.problem(13, 5, 16, 128, 2)
    sizes = np.array([2, 3], np.int32)
    assert form.function(a, b, group_sizes=sizes, preferred_element_type=None).dtype == jnp.bfloat16


@contiguous
def test_no_kernel_and_no_derivative(form):
    a, b = form.problem(12, M, N, K, G)
    sizes = np.array(SIZES[0], np.int32)
    with pytest.raises(NotImplementedError, match="has no kernel"):
        form.function(a, b, group_sizes=sizes, implementation="cuda")

    def loss(x):
        operand = (a.data, x) if form.fp8 else x
        return form.function(operand, b, group_sizes=sizes).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match=f"{form} has no derivative"):
        jax.grad(loss)(a.scale if form.fp8 else a)


@contiguous
def test_example_of_the_docstring(form):
    (case,) = doctest.DocTestFinder(recurse=False).find(form.function, form.name)
    assert doctest.DocTestRunner().run(case).failed == 0


@pytest.mark.parametrize(
    ("spelling", "said"),
    [
        ({"group_sizes": [-1, 20, 30, 20]}, "negative group_sizes: 1 of them"),
        ({"group_sizes": [1, 20, 30, 20]}, "more than the 70 rows: 1 of them"),
        ({"group_offsets": [0, 20, 30, 40, 71]}, "outside of 0 to 70: 1 of them"),
        ({"group_offsets": [0, 20, 10, 40, 60]}, "less than the one before: 1 of them"),
        ({"m_indices": [-2, 4, *[-1] * 68]}, "no group's of 4 nor -1: 2 of them"),
    ],
)
def test_numbers_out_of_range_are_reported_if_that_is_wished(monkeypatch, caplog, spelling, said):
    a, b = Form("m_grouped_bf16_gemm_nn_contiguous").problem(3, M, N, K, G)
    spelling = {name: np.array(x, np.int32) for name, x in spelling.items()}

    def call():
        run = jax.jit(lambda a, b, x: m_grouped_bf16_gemm_nn_contiguous(a, b, **x))
        jax.block_until_ready(run(a, b, spelling))
        jax.effects_barrier()

    call()
    assert not caplog.records
    monkeypatch.setenv("DEEPGEMM_JAX_DEBUG_GROUPS", "1")
    call()
    assert [said in record.getMessage() for record in caplog.records] == [True]
