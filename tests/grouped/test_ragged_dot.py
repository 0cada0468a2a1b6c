"""ragged_dot and ragged_dot_general, argument for argument against jax.lax's and float64 loops."""

import doctest
import functools
import inspect
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped.cases import SIZES, Form, every_recipe, ids, pick, random_array, scaled, spans, swap
from jax.lax import RaggedDotDimensionNumbers
from oracles import assert_close, on_each_platform, put

from deepgemm_jax import ScaledArray, ragged_dot, ragged_dot_general
from deepgemm_jax.grouped import groups

M, K, N, G = 70, 33, 20, 4
FORM = Form("m_grouped_bf16_gemm_nn_contiguous")  # of which ragged_dot is the same in any dtype
FITTING = [sizes for sizes in SIZES if min(sizes) >= 0 and sum(sizes) <= M]


def problem(seed, dtype=jnp.bfloat16, rhs_dtype=None):
    rng = np.random.default_rng(seed)
    rhs = random_array(rng, G, K, N, dtype=rhs_dtype or dtype)
    return random_array(rng, M, K, dtype=dtype), rhs


jitted = jax.jit(ragged_dot, static_argnames=("preferred_element_type", "precision"))


@on_each_platform
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(platform, sizes):
    lhs, rhs = problem(0)
    d = jitted(*put((lhs, rhs), platform), np.array(sizes, np.int32))
    assert_close(d, FORM.expected(lhs, rhs, ids(sizes, M)), platform)


def test_every_set_of_empty_groups():
    lhs, rhs = problem(1)
    for present in itertools.product([0, 1], repeat=G):
        sizes = (np.array(present) * [9, 30, 1, 20]).astype(np.int32)
        assert_close(jitted(lhs, rhs, sizes), FORM.expected(lhs, rhs, ids(sizes, M)))


def assert_alike(ours, theirs):
    assert (ours.shape, ours.dtype, ours.weak_type) == (theirs.shape, theirs.dtype, False)
    tolerance = 8 * float(jnp.finfo(ours.dtype).eps)
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * abs(theirs).max())


def test_arguments_are_those_of_jax():
    for ours, theirs in [
        (ragged_dot, jax.lax.ragged_dot),
        (ragged_dot_general, jax.lax.ragged_dot_general),
    ]:
        theirs = list(inspect.signature(theirs).parameters.values())
        ours = list(inspect.signature(ours).parameters.values())
        assert [(p.name, p.default) for p in ours[:-1]] == [(p.name, p.default) for p in theirs]
        assert ours[-1].name == "implementation"


@pytest.mark.parametrize(
    ("dtype", "preferred", "precision"),
    [
        (jnp.bfloat16, None, None),
        (jnp.bfloat16, jnp.float32, "highest"),
        (jnp.float16, jnp.float32, None),
        (jnp.float32, None, jax.lax.Precision.HIGH),
    ],
)
def test_agrees_with_jax(dtype, preferred, precision):
    lhs, rhs = problem(2, dtype)
    for sizes in FITTING[:3]:
        arguments = lhs, rhs, np.array(sizes, np.int32), precision, preferred
        assert_alike(jitted(*arguments), jax.lax.ragged_dot(*arguments))


def test_other_dtypes():
    rng = np.random.default_rng(3)
    sizes = np.array(FITTING[0], np.int32)
    lhs, rhs = (rng.integers(-9, 9, shape).astype(np.int8) for shape in ((M, K), (G, K, N)))
    d = jitted(lhs, rhs, sizes, preferred_element_type=jnp.int32)
    assert d.dtype == jnp.int32
    np.testing.assert_array_equal(d, FORM.expected(lhs, rhs, ids(sizes, M)).value)
    lhs, rhs = problem(3, jnp.float8_e4m3fn)
    d = jitted(lhs, rhs, sizes, preferred_element_type=jnp.float32)
    assert_close(d, FORM.expected(lhs, rhs, ids(sizes, M)))


@pytest.mark.parametrize("offset", [0, 1, 3, 4, 7, -1, -6])
@pytest.mark.parametrize("count", [2, 4])
def test_shard_of_the_experts(offset, count):
    lhs, rhs = problem(4)
    for sizes in SIZES[0], SIZES[6]:
        d = jitted(lhs, rhs[:count], np.array(sizes, np.int32), group_offset=np.array([offset]))
        assert_close(d, FORM.expected(lhs, rhs[:count], ids(sizes, M, offset, count)))


# With the shapes of lhs, rhs and group_sizes.
MODES = {
    "basic": (([1], [1], [], [], [0], [0]), (12, 6), (3, 6, 8), (3,)),
    "transposed": (([1], [2], [], [], [0], [0]), (12, 6), (3, 8, 6), (3,)),
    "batch": (([2], [1], [0], [2], [1], [0]), (2, 12, 6), (3, 6, 2, 8), (2, 3)),
    "outer": (([2], [1], [], [], [1], [0]), (5, 12, 6), (3, 6, 8), (5, 3)),
    "inner": (([2], [1], [], [], [0], [0]), (12, 5, 6), (3, 6, 8), (3,)),
    "all": (
        ([4, 1], [1, 3], [2], [0], [3], [2]),
        (5, 6, 2, 12, 7, 3),
        (2, 7, 3, 6, 8, 4),
        (2, 5, 3),
    ),
    "broadcast": (([3], [2], [0], [0], [2], [1]), (2, 5, 12, 6), (2, 3, 6, 8), (3,)),
    "vector": (([1], [1], [], [], [0], [0]), (12, 6), (3, 6), (3,)),
    "sums": (([0], [0], [], [], [0], []), (12, 6), (12, 8), (3,)),
    "sums_rows": (([1], [1], [], [], [1], []), (6, 12), (8, 12), (3,)),
    "sums_batch": (([1], [2], [0], [1], [1], []), (2, 12, 6), (8, 2, 12), (2, 3)),
    "sums_outer": (([1, 0], [0, 1], [], [], [0], []), (12, 5, 6), (5, 12, 8), (5, 3)),
    "sums_inner": (([0, 1], [1, 0], [], [], [0], []), (12, 5, 6), (5, 12, 8), (3,)),
    "ragged_batch": (([2], [2], [0], [0], [0], []), (12, 5, 6), (12, 8, 6), (3,)),
    "ragged_batch_outer": (([3], [2], [0, 1], [0, 1], [1], []), (2, 12, 5, 6), (2, 12, 6), (2, 3)),
}


def dims(l_contract, r_contract, l_batch, r_batch, ragged, group):
    return RaggedDotDimensionNumbers(((l_contract, r_contract), (l_batch, r_batch)), ragged, group)


def random_sizes(rng, shape, rows):
    sizes = rng.multinomial(rows, [1 / shape[-1]] * shape[-1], shape[:-1])
    return sizes.astype(np.int32)


@pytest.mark.parametrize("mode", MODES)
def test_modes_agree_with_jax(mode):
    numbers, lhs_shape, rhs_shape, sizes_shape = MODES[mode]
    rng = np.random.default_rng(6)
    lhs, rhs = (random_array(rng, *shape, dtype=np.float32) for shape in (lhs_shape, rhs_shape))
    arguments = lhs, rhs, random_sizes(rng, sizes_shape, 12), dims(*numbers)
    ours = jax.jit(ragged_dot_general, static_argnums=3)(*arguments)
    assert_alike(ours, jax.lax.ragged_dot_general(*arguments, precision="highest"))


def test_sums_below_and_from_a_group_on():
    numbers, lhs_shape, rhs_shape, _ = MODES["sums"]
    rng = np.random.default_rng(7)
    lhs, rhs = (random_array(rng, *shape, dtype=np.float32) for shape in (lhs_shape, rhs_shape))
    sizes = np.array([3, -2, 4], np.int32)
    form = Form("k_grouped_bf16_gemm_tn_contiguous")
    expected = form.expected_sums(lhs, rhs, spans(sizes, 12))
    assert_close(ragged_dot_general(lhs, rhs, sizes, dims(*numbers)), expected)
    expected = form.expected_sums(lhs, rhs, [(0, 0), *spans(sizes, 12)[1:]])
    assert_close(ragged_dot_general(lhs, rhs, sizes, dims(*numbers), group_offset=1), expected)


def test_batch_elements_of_no_group_are_zero():
    numbers, lhs_shape, rhs_shape, _ = MODES["ragged_batch"]
    rng = np.random.default_rng(8)
    lhs, rhs = (random_array(rng, *shape, dtype=np.float32) for shape in (lhs_shape, rhs_shape))
    whole = jax.lax.dot_general(lhs, rhs, dims(*numbers).dot_dimension_numbers)
    sizes = np.array([3, 2, 4], np.int32)
    d = ragged_dot_general(lhs, rhs, sizes, dims(*numbers))
    np.testing.assert_array_equal(d, np.where(np.arange(12)[:, None, None] < 9, whole, 0))
    d = ragged_dot_general(lhs, rhs, sizes, dims(*numbers), group_offset=1)
    np.testing.assert_array_equal(d[:3], np.zeros((3, 5, 8)))
    np.testing.assert_array_equal(d[3:9], whole[3:9])

    def gradients(lhs, rhs):
        product = lambda *x: ragged_dot_general(*x, sizes, dims(*numbers))  # noqa: E731
        d, pullback = jax.vjp(product, lhs, rhs)
        return pullback(jnp.ones_like(d))

    wanted = gradients(lhs, rhs)
    lhs[9:], rhs[9:] = np.nan, np.nan
    for found, x in zip(gradients(lhs, rhs), wanted, strict=True):
        np.testing.assert_array_equal(found[:9], x[:9])
        assert not found[9:].any()


@pytest.mark.parametrize("mode", ["basic", "transposed", "all", "sums_outer", "ragged_batch"])
def test_gradients(mode):
    """A product is linear in each operand, so its slope in a direction is itself, of it."""
    numbers, lhs_shape, rhs_shape, sizes_shape = MODES[mode]
    rng = np.random.default_rng(9)
    sizes = random_sizes(rng, sizes_shape, 10)
    operands, directions = (
        [random_array(rng, *shape, dtype=np.float32) for shape in (lhs_shape, rhs_shape)]
        for _ in range(2)
    )

    @jax.jit
    def slopes(operands, directions):
        def dot(lhs, rhs):
            return ragged_dot_general(lhs, rhs, sizes, dims(*numbers), precision="highest")

        d, pullback = jax.vjp(dot, *operands)
        found = [jnp.vdot(*pair) for pair in zip(pullback(d), directions, strict=True)]
        lhs, rhs = operands
        parts = dot(directions[0], rhs), dot(lhs, directions[1])
        _, tangent = jax.jvp(dot, operands, directions)
        return found, [jnp.vdot(d, x) for x in parts], tangent, sum(parts)

    found, expected, tangent, total = slopes(operands, directions)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(tangent, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_forward_mode_agrees_with_jax(preferred):
    operands, tangents = (tuple(map(jnp.asarray, problem(seed))) for seed in (22, 23))
    sizes = np.array(FITTING[4], np.int32)

    def slope(dot, tangents):
        product = functools.partial(dot, group_sizes=sizes, preferred_element_type=preferred)
        return jax.jvp(product, operands, tangents)[1]

    expected = slope(jax.lax.ragged_dot, tangents)
    of_no_group = tangents[0].at[sizes.sum() :].set(jnp.nan)
    assert_alike(slope(ragged_dot, (of_no_group, tangents[1])), expected)


def test_linear_maps():
    lhs, rhs = map(jnp.asarray, problem(24, jnp.float32))
    product = functools.partial(ragged_dot, group_sizes=np.array(FITTING[0], np.int32))
    d, slope = jax.linearize(product, lhs, rhs)
    np.testing.assert_array_equal(slope(lhs, jnp.zeros_like(rhs)), d)
    _, pullback = jax.vjp(product, lhs, rhs)
    of_lhs = jax.linear_transpose(lambda lhs: product(lhs, rhs), lhs)
    of_rhs = jax.linear_transpose(lambda rhs: product(lhs, rhs), rhs)
    for found, expected in zip((*of_lhs(d), *of_rhs(d)), pullback(d), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_integers_have_no_slope():
    rng = np.random.default_rng(25)
    lhs, rhs = jnp.asarray(rng.integers(-9, 9, (M, K)), jnp.int8), jnp.ones((G, K, N))
    sizes = np.array(FITTING[0], np.int32)

    def product(preferred):
        return lambda rhs: ragged_dot(lhs, rhs, sizes, preferred_element_type=preferred)

    d, slope = jax.jvp(product(jnp.float32), (rhs,), (rhs,))
    np.testing.assert_array_equal(slope, d)
    _, slope = jax.jvp(product(jnp.int32), (rhs,), (rhs,))
    assert slope.dtype == jax.dtypes.float0
    assert not jax.grad(lambda rhs: product(jnp.int32)(rhs).sum().astype(jnp.float32))(rhs).any()


def test_training_step_agrees_with_jax():
    dtype = jnp.bfloat16
    lhs, rhs = problem(10, dtype)
    sizes = np.array(FITTING[0], np.int32)

    def loss(dot, lhs, rhs):
        return (jnp.tanh(dot(lhs, rhs, sizes) * 0.1) ** 2).sum().astype(jnp.float32)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, dot), (0, 1)))(lhs, rhs)
        for dot in (ragged_dot, jax.lax.ragged_dot)
    )
    for x, y in zip(ours, theirs, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        tolerance = float(jnp.finfo(dtype).eps) * 8
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * abs(y).max())


def test_second_derivative():
    lhs, rhs = problem(11, jnp.float32)
    sizes = np.array(FITTING[0], np.int32)
    one_hot = np.eye(G, dtype=np.float32)[ids(sizes, M)]

    def curve(dot):
        def slope(lhs, rhs):
            gradients = jax.grad(lambda *xs: (dot(*xs) ** 2).sum(), (0, 1))(lhs, rhs)
            return sum((x**2).sum() for x in gradients)

        return jax.jit(jax.grad(slope, (0, 1)))(lhs, rhs)

    ours = curve(lambda lhs, rhs: ragged_dot(lhs, rhs, sizes))
    theirs = curve(lambda lhs, rhs: jnp.einsum("mk,gkn,mg->mn", lhs, rhs, one_hot))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * abs(np.asarray(y)).max())


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivative_by_either_mode(outer, inner):
    rng = np.random.default_rng(26)
    lhs, rhs = (random_array(rng, *shape, dtype=np.float32) for shape in ((7, 3), (2, 3, 4)))
    sizes = np.array([4, 2], np.int32)
    one_hot = ids(sizes, 7)[:, None] == np.arange(2)

    def curve(dot):
        of_loss = inner(lambda *xs: jnp.tanh(dot(*xs)).sum(), (0, 1))
        return jax.tree.leaves(jax.jit(outer(of_loss, (0, 1)))(lhs, rhs))

    ours = curve(lambda lhs, rhs: ragged_dot(lhs, rhs, sizes))
    theirs = curve(lambda lhs, rhs: jnp.einsum("mk,gkn,mg->mn", lhs, rhs, one_hot))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_sizes_are_data():
    lhs, rhs = problem(12)
    traces = []

    @jax.jit
    def dot(lhs, rhs, sizes, offset):
        traces.append(sizes)
        return ragged_dot(lhs, rhs, sizes, group_offset=offset)

    with jax.transfer_guard_device_to_host("disallow"):
        for sizes in SIZES:
            dot(lhs, rhs, np.array(sizes, np.int32), np.array([1], np.int32))
    assert len(traces) == 1


def test_vmap_of_rows():
    lhs, rhs = problem(13)
    lhs, sizes = np.stack([lhs, lhs[::-1]]), np.array(SIZES[0], np.int32)

    @jax.jit
    def both(lhs, rhs):
        product = lambda rhs: jax.vmap(ragged_dot, (0, None, None))(lhs, rhs, sizes)  # noqa: E731
        d, pullback = jax.vjp(product, rhs)
        _, slope = jax.jvp(product, (rhs,), (rhs,))
        return d, slope, *pullback(jnp.ones_like(d))

    d, slope, gradient = both(lhs, rhs)
    np.testing.assert_array_equal(slope, d)
    for i in range(2):
        assert_close(d[i], FORM.expected(lhs[i], rhs, ids(sizes, M)))
    sums = np.stack([lhs[:, slice(*s)].astype(np.float64).sum((0, 1)) for s in spans(sizes, M)])
    np.testing.assert_allclose(np.asarray(gradient[..., 0], np.float64), sums, rtol=0.02, atol=0.5)


@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [(jnp.bfloat16, None), (jnp.float8_e4m3fn, None), (jnp.float32, jnp.int32)],
)
def test_dtypes_of_sums(dtype, preferred):
    """None is promoted implicitly, and a result of integers is not summed in them."""
    lhs, rhs = problem(18, dtype)
    sizes = np.array(FITTING[0], np.int32)
    arguments = jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(sizes), None, preferred
    with jax.numpy_dtype_promotion("strict"):
        d = ragged_dot(*arguments)
    wanted = FORM.expected(lhs, rhs, ids(sizes, M)).value
    assert d.dtype == (preferred or dtype)
    if preferred == jnp.int32:
        assert (abs(np.asarray(d) - wanted) < 1.01).all()
    else:
        held = abs(wanted) < 100  # by float8_e4m3fn, too
        np.testing.assert_allclose(np.asarray(d, np.float64)[held], wanted[held], 0.1, 2)


@pytest.mark.parametrize(
    ("m", "k", "n", "g"), [(0, 4, 4, 2), (5, 0, 4, 2), (5, 4, 0, 2), (5, 4, 4, 0)]
)
def test_nothing_to_multiply(m, k, n, g):
    lhs, rhs, sizes = jnp.ones((m, k)), jnp.ones((g, k, n)), jnp.ones(g, jnp.int32)
    d, pullback = jax.vjp(lambda lhs, rhs: ragged_dot(lhs, rhs, sizes), lhs, rhs)
    assert d.shape == (m, n) and not d.any()
    for x, dx in zip((lhs, rhs), pullback(jnp.ones_like(d)), strict=True):
        assert dx.shape == x.shape and not dx.any()


# Scaled operands.


@on_each_platform
@pytest.mark.parametrize("layout", ["nn", "nt"])
@pytest.mark.parametrize("preferred", [None, jnp.float32, jnp.float16])
def test_scaled_arrays(platform, layout, preferred):
    form = Form(f"m_grouped_fp8_gemm_{layout}_contiguous")
    lhs, rhs = form.problem(14, M, 136, 144, G)
    sizes = np.array(SIZES[0], np.int32)
    numbers, *_ = MODES["basic" if layout == "nn" else "transposed"]
    dot = jax.jit(
        functools.partial(
            ragged_dot_general,
            ragged_dot_dimension_numbers=dims(*numbers),
            preferred_element_type=preferred,
        )
    )
    d = dot(*put((lhs, rhs), platform), sizes)
    assert d.dtype == (preferred or jnp.bfloat16)
    if preferred != jnp.float16:  # whose range ends before this product's
        assert_close(d, form.expected(lhs, rhs, ids(sizes, M)), platform)
    if layout == "nn" and preferred is None:
        pairs = (lhs.data, lhs.scale), (rhs.data, rhs.scale)
        np.testing.assert_array_equal(ragged_dot(*pairs, sizes), d)
        part = ragged_dot(lhs, pick(rhs, np.s_[1:3]), sizes, group_offset=1)
        assert_close(part, form.expected(lhs, pick(rhs, np.s_[1:3]), ids(sizes, M, 1, 2)))


def test_vmap_of_scaled_arrays():
    form = Form("m_grouped_fp8_gemm_nn_contiguous")
    lhs, rhs = form.problem(17, M, 136, 144, G)
    sizes = np.array(SIZES[0], np.int32)
    wanted = ragged_dot(lhs, rhs, sizes)
    lhs, rhs = (jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), x) for x in (lhs, rhs))
    each = jax.vmap(lambda lhs: jax.vmap(lambda rhs: ragged_dot(lhs, rhs, sizes))(rhs))(lhs)
    np.testing.assert_array_equal(each, jnp.broadcast_to(wanted, (2, 2, *wanted.shape)))


@pytest.mark.parametrize("layout", ["tn", "nt"])
def test_scaled_sums(layout):
    form = Form(f"k_grouped_fp8_gemm_{layout}_contiguous")
    lhs, rhs = form.sum_problem(15, 32, 48, M)
    sizes = np.array(SIZES[0], np.int32)
    numbers, *_ = MODES["sums" if layout == "tn" else "sums_rows"]
    d = ragged_dot_general(lhs, rhs, sizes, dims(*numbers), preferred_element_type=jnp.float32)
    assert_close(d, form.expected_sums(lhs, rhs, spans(sizes, M)))


def dequantized(x):
    return np.asarray(x.dequantize(), np.float32)


@every_recipe
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_scales_of_every_recipe_have_a_kernel(recipe, of_a, of_b, dtype):
    rng = np.random.default_rng(19)
    lhs, rhs = scaled(rng, dtype, of_a, M, 144), swap(scaled(rng, dtype, of_b, G, 136, 144))
    sizes = np.array(SIZES[0], np.int32)
    dot = jax.jit(functools.partial(ragged_dot, preferred_element_type=jnp.float32))
    program = dot.trace(lhs, rhs, sizes).lower(lowering_platforms=("cuda",)).as_text()
    assert "deepgemm_jax_gemm" in program
    expected = FORM.expected(dequantized(lhs), dequantized(rhs), ids(sizes, M))
    assert_close(dot(lhs, rhs, sizes), expected)


def test_scales_of_other_kinds_are_multiplied_in():
    form = Form("m_grouped_fp8_gemm_nn_contiguous")
    lhs, rhs = form.problem(16, M, 136, 144, G)
    sizes = np.array(SIZES[0], np.int32)
    row_wise = ScaledArray(lhs.data, np.abs(lhs.scale[:, :1]) + 1)
    per_tensor = ScaledArray(rhs.data, np.full((1, 1, 1), 0.5, np.float32))
    float32 = {"preferred_element_type": jnp.float32}
    for x, y in [(row_wise, rhs), (lhs, per_tensor), (row_wise, per_tensor)]:
        d = ragged_dot(x, y, sizes, **float32)
        assert_close(d, FORM.expected(dequantized(x), dequantized(y), ids(sizes, M)))
    plain = random_array(np.random.default_rng(16), G, 144, 136, dtype=np.float32)
    d = ragged_dot(lhs, plain, sizes)
    assert d.dtype == jnp.float32
    assert_close(d, FORM.expected(dequantized(lhs), plain, ids(sizes, M)))


@pytest.mark.parametrize("dtype", [jnp.int8, bool, jnp.float8_e4m3fn, jnp.float16, jnp.bfloat16])
def test_scales_are_multiplied_in_beside_what_is_narrow(dtype):
    """In float32, if the other operand's dtype could not hold the product with scales."""
    scaled = ScaledArray(jnp.ones((M, 4), jnp.float8_e4m3fn), jnp.full((M, 1), 1.25))
    plain, sizes = jnp.ones((G, 4, N)).astype(dtype), np.array(FITTING[0], np.int32)
    d = ragged_dot(scaled, plain, sizes)
    assert d.dtype == (dtype if dtype in (jnp.float16, jnp.bfloat16) else jnp.float32)
    wanted = np.where(ids(sizes, M) >= 0, 5, 0)
    np.testing.assert_array_equal(d, np.broadcast_to(wanted[:, None], (M, N)))


@pytest.mark.parametrize("setting", ["1", "0", "", None])
def test_reports_of_numbers_that_were_clamped(monkeypatch, caplog, setting):
    if setting is None:
        monkeypatch.delenv("DEEPGEMM_JAX_DEBUG_GROUPS", raising=False)
    else:
        monkeypatch.setenv("DEEPGEMM_JAX_DEBUG_GROUPS", setting)
    lhs, rhs = problem(20)
    sizes = np.array(FITTING[0], np.int32)
    wrong = [(2, 3), (2, -1), (4, 1), (4, np.uint32(2**32 - 1))]
    right = [(2, 2), (4, np.uint32(0)), (4, np.int8(0))]
    with caplog.at_level(logging.WARNING, "deepgemm_jax"):
        for count, offset in right + wrong:
            ragged_dot(lhs, rhs[:count], sizes, group_offset=offset)
        for dtype in np.uint8, np.uint32, np.int32:
            groups.row_ids("op", 3, G, np.array([0, 3, 2], dtype))
        for rows in [0, 3, 2**32 - 1], [0, 4, 2]:
            groups.row_ids("op", 3, G, np.array(rows, np.uint32))
        jax.effects_barrier()
    reports = [
        *(f"ragged_dot: group_offset outside of 0 to {G - n}: 1 of them" for n, _ in wrong),
        *["op: m_indices that are no group's of 4 nor -1: 1 of them"] * 2,
    ]
    assert [record.message for record in caplog.records] == (reports if setting == "1" else [])


def test_scaled_arrays_that_no_kernel_takes():
    lhs, rhs = Form("m_grouped_fp8_gemm_nn_contiguous").problem(17, M, 9, 40, G)
    sizes = np.array(SIZES[0], np.int32)
    d = ragged_dot(lhs, rhs, sizes, preferred_element_type=jnp.float32)
    assert_close(d, FORM.expected(dequantized(lhs), dequantized(rhs), ids(sizes, M)))


def test_scaled_arrays_have_no_derivative():
    lhs, rhs = Form("m_grouped_fp8_gemm_nn_contiguous").problem(18, M, 16, 128, G)
    sizes = np.array(SIZES[0], np.int32)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        jax.grad(
            lambda scale: ragged_dot(
                (lhs.data, scale), rhs, sizes, preferred_element_type=jnp.float32
            ).sum()
        )(lhs.scale)


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"lhs": np.zeros((M, K + 1), jnp.bfloat16)}, TypeError, "contracting"),
        ({"group_sizes": np.zeros(3, np.int32)}, TypeError, "rhs group dimension"),
        ({"group_sizes": np.zeros(G)}, TypeError, "integer"),
        ({"group_offset": np.zeros(2, np.int32)}, ValueError, "group_offset has shape"),
        ({"group_offset": 0.5}, TypeError, "group_offset has dtype"),
        (
            {"group_offset": 0, "group_sizes": np.zeros(3, np.int32)},
            ValueError,
            "rhs has 4 groups, wanted no more than the 3",
        ),
        ({"lhs": (1, 2, 3)}, TypeError, "lhs is .* wanted a ScaledArray"),
        (
            {"lhs": (np.zeros((M, K), jnp.bfloat16), np.zeros((3, 1)))},
            ValueError,
            r"lhs.scale has shape \(3, 1\) for data of shape .* wanted 70 or 1",
        ),
        ({"out_sharding": "x"}, TypeError, "out_sharding is x"),
        ({"implementation": "gpu"}, ValueError, "implementation is 'gpu'"),
    ],
)
def test_bad_input(changed, error, named):
    lhs, rhs = problem(19)
    arguments = {"lhs": lhs, "rhs": rhs, "group_sizes": np.zeros(G, np.int32)} | changed
    with pytest.raises(error, match=f"^ragged_dot: .*{named}"):
        ragged_dot(**arguments)


@pytest.mark.parametrize("mode", ["basic", "transposed", "sums", "ragged_batch"])
def test_implementation(mode):
    numbers, lhs_shape, rhs_shape, sizes_shape = MODES[mode]
    arguments = np.ones(lhs_shape), np.ones(rhs_shape), np.ones(sizes_shape, int), dims(*numbers)
    ragged_dot_general(*arguments, implementation="xla")
    with pytest.raises(NotImplementedError, match="ragged_dot.* has no kernel for"):
        ragged_dot_general(*arguments, implementation="cuda")


@pytest.mark.parametrize("function", [ragged_dot, ragged_dot_general])
def test_example_of_the_docstring(function):
    (case,) = doctest.DocTestFinder(recurse=False).find(function)
    assert doctest.DocTestRunner().run(case).failed == 0
