"""Grouped GEMMs on a mesh of eight CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped.cases import Form, forms, ids, masked, pick, random_array, spans
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import assert_close

from deepgemm_jax import ragged_dot

M, N, K, G = 64, 512, 256, 4
SIZES = np.array([20, 0, 33, 5], np.int32)
RAGGED = Form("m_grouped_bf16_gemm_nn_contiguous")


def compiled(function, *operands):
    made = jax.jit(function).lower(*operands).compile()
    return made(*operands), collectives(made)


@forms("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_bf16_gemm_nn_contiguous")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("a_spec", "b_spec", "d_spec", "needed"),
    [
        (("x",), (None, "y"), ("x", "y"), set()),
        ((None, "x"), (None, None, "x"), (), {"all-reduce"}),
    ],
    ids=["rows", "sums"],
)
def test_rows_columns_and_sums_are_divided(mesh, form, kind, a_spec, b_spec, d_spec, needed):
    a, b = form.problem(0, M, N, K, G)
    if "_nn_" in form.name:
        b_spec = (None, *reversed((*b_spec[1:], *[None] * (3 - len(b_spec)))))
    gemm = functools.partial(form.function, preferred_element_type=jnp.float32)
    with mesh(kind):
        d, found = compiled(
            lambda a, b, sizes: gemm(a, b, group_sizes=sizes),
            *jax.device_put((a, b), (P(*a_spec), P(*b_spec))),
            SIZES,
        )
        assert found == needed
        assert d.sharding.is_equivalent_to(NamedSharding(jax.sharding.get_mesh(), P(*d_spec)), 2)
    assert_close(d, form.expected(a, b, ids(SIZES, M)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gradients_lie_as_their_operands(mesh, kind):
    lhs, rhs = RAGGED.problem(7, M, N, K, G)

    def gradient(lhs, rhs, sizes):
        return jax.grad(lambda *x: ragged_dot(*x, sizes).astype(jnp.float32).sum(), (0, 1))(
            lhs, rhs
        )

    wanted = jax.jit(gradient)(lhs, rhs, SIZES)
    for *specs, sizes_spec in [(P(None, "x"), P(), P()), (P(), P("x"), P("x"))]:
        with mesh(kind):
            operands = jax.device_put((lhs, rhs), tuple(specs))
            found = jax.jit(gradient)(*operands, jax.device_put(SIZES, sizes_spec))
            for x, dx, dx_wanted in zip(operands, found, wanted, strict=True):
                if kind == AxisType.Explicit:
                    assert dx.sharding.is_equivalent_to(x.sharding, x.ndim)
                np.testing.assert_allclose(
                    np.asarray(dx, np.float64), np.asarray(dx_wanted, np.float64), 0.02, 0.05
                )


@masked
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_masked_groups_are_divided(mesh, form, kind):
    a, b = form.masked_problem(1, 32, N, K, G)
    counts = np.array([5, 0, 20, 32], np.int32)
    with mesh(kind):
        d, found = compiled(
            form.function, *jax.device_put((a, b, counts), (P("x"), P("x", "y"), P("x")))
        )
        assert found == set()
    d = np.asarray(d)
    for g in range(G):
        rows = np.s_[g, : counts[g]]
        assert_close(d[rows], form.dense(pick(a, rows), pick(b, g)))


@forms("k_grouped_fp8_gemm_tn_contiguous", "k_grouped_bf16_gemm_nt_contiguous")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_k_grouped_columns_are_divided(mesh, form, kind):
    a, b = form.sum_problem(2, 64, 128, 70)
    specs = (P(None, "x"), P(None, "y")) if "_tn_" in form.name else (P("x"), P("y"))
    c = random_array(np.random.default_rng(2), G, 64, 128, dtype=np.float32)
    with mesh(kind):
        d, found = compiled(
            lambda a, b, c, sizes: form.function(a, b, c, group_sizes=sizes),
            *jax.device_put((a, b, c), (*specs, P(None, "x", "y"))),
            SIZES,
        )
        assert found == set()
        assert d.sharding.is_equivalent_to(c_sharding(), 3)
    assert_close(d, form.expected_sums(a, b, spans(SIZES, 70), c))


def c_sharding():
    return NamedSharding(jax.sharding.get_mesh(), P(None, "x", "y"))


@forms("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_bf16_gemm_nn_contiguous")
def test_types_follow_what_varies(mesh, form):
    a, b = form.problem(3, M, 32, 128, G)
    rows = ids(SIZES, M)

    def gemm(a, b, rows):
        return form.function(a, b, m_indices=rows)

    def sharded(in_specs, out_specs):
        return jax.jit(jax.shard_map(gemm, in_specs=in_specs, out_specs=out_specs, check_vma=True))

    with mesh(AxisType.Auto):
        d = sharded((P("x"), P(), P("x")), P("x"))(a, b, rows)
        assert_close(d, form.expected(a, b, rows))
        with pytest.raises(ValueError, match="out_specs"):
            sharded((P("x"), P(), P("x")), P())(a, b, rows)


def expert_parallel(lhs, rhs, sizes):
    """Each device has all rows and a part of the experts."""
    first = jax.lax.axis_index("y") * rhs.shape[0]
    return jax.lax.psum(ragged_dot(lhs, rhs, sizes, group_offset=first), "y")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_experts_are_divided(mesh, kind):
    rng = np.random.default_rng(4)
    lhs = random_array(rng, 2 * M, 33, dtype=np.float32)
    rhs = random_array(rng, 8, 33, 20, dtype=np.float32)
    sizes = np.array([9, 0, 20, 1, 0, 14, 3, 5], np.int32)
    cotangent = random_array(rng, 2 * M, 20, dtype=np.float32)
    with mesh(kind):
        sharded = jax.shard_map(
            expert_parallel, in_specs=(P("x"), P("y"), P()), out_specs=P("x"), check_vma=True
        )
        operands = jax.device_put((lhs, rhs), (P("x"), P("y")))

        @jax.jit
        def both(lhs, rhs, cotangent):
            d, pullback = jax.vjp(lambda lhs, rhs: sharded(lhs, rhs, sizes), lhs, rhs)
            return d, *pullback(cotangent)

        d, d_lhs, d_rhs = map(np.asarray, both(*operands, jax.device_put(cotangent, P("x"))))
    for half in (slice(0, M), slice(M, None)):
        rows = ids(sizes, M)
        assert_close(d[half], RAGGED.expected(lhs[half], rhs, rows))
        assert_close(d_lhs[half], RAGGED.expected(cotangent[half], rhs.swapaxes(1, 2), rows))
    weights = Form("k_grouped_bf16_gemm_tn_contiguous")
    parts = [
        weights.expected_sums(lhs[half], cotangent[half], spans(sizes, M)).value
        for half in (slice(0, M), slice(M, None))
    ]
    np.testing.assert_allclose(d_rhs, sum(parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_modes_compose_where_experts_are_divided(mesh, kind, check_vma):
    operands, tangents = (
        tuple(0.1 * rng.normal(size=shape).astype(np.float32) for shape in ((M, 33), (8, 33, 20)))
        for rng in map(np.random.default_rng, (12, 13))
    )
    sizes = np.array([9, 0, 20, 1, 0, 14, 3, 5], np.int32)

    def curve(dot, operands, tangents):
        of_loss = jax.grad(lambda *xs: jnp.tanh(dot(*xs)).sum(), (0, 1))
        return jax.jit(lambda *xs: jax.jvp(of_loss, *xs))(operands, tangents)

    expected = curve(lambda *xs: ragged_dot(*xs, sizes), operands, tangents)
    with mesh(kind):
        sharded = jax.shard_map(
            lambda *xs: expert_parallel(*xs, sizes),
            in_specs=(P(), P("y")),
            out_specs=P(),
            check_vma=check_vma,
        )
        specs = P(), P("y")
        found = curve(sharded, jax.device_put(operands, specs), jax.device_put(tangents, specs))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("manual", [True, False])
def test_tangents_that_are_the_same_on_all_devices(mesh, kind, manual):
    lhs, rhs = (np.ones(shape, np.float32) for shape in ((2 * M, 33), (G, 33, 20)))
    sizes = np.array([20, 0, 33, 11], np.int32)

    def slope(lhs, rhs):
        tangents = jnp.full(lhs.shape, 2.0), jnp.full(rhs.shape, 3.0)
        return jax.jvp(lambda *xs: ragged_dot(*xs, sizes), (lhs, rhs), tangents)[1]

    with mesh(kind):
        if manual:
            slope = jax.shard_map(slope, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=True)
        d = jax.jit(slope)(*jax.device_put((lhs, rhs), (P("x"), P())))
        rows = np.s_[:] if manual else np.s_[:M]
        np.testing.assert_array_equal(np.asarray(d)[rows], 33 * 5.0)


def test_scaled_experts_are_divided(mesh):
    form = Form("m_grouped_fp8_gemm_nn_contiguous")
    lhs, rhs = form.problem(5, M, 32, 128, 8)
    sizes = np.array([9, 0, 20, 1, 0, 14, 3, 5], np.int32)
    with mesh(AxisType.Auto):
        sharded = jax.shard_map(
            expert_parallel, in_specs=(P(), P("y"), P()), out_specs=P(), check_vma=True
        )
        d = jax.jit(sharded)(lhs, rhs, sizes)
    assert_close(d, form.expected(lhs, rhs, ids(sizes, M)))


def test_weight_gradient_inside_shard_map(mesh):
    """Groups that are one device's alone, of K that is its own too."""
    form = Form("k_grouped_bf16_gemm_tn_contiguous")
    a, b = form.sum_problem(6, 32, 48, 140)
    sizes = np.array([30, 0, 20, 7], np.int32)
    with mesh(AxisType.Auto):
        sharded = jax.shard_map(
            lambda a, b, sizes: form.function(a, b, group_sizes=sizes),
            in_specs=(P("x"), P("x"), P("x")),
            out_specs=P("x"),
            check_vma=True,
        )
        d = jax.jit(sharded)(a, b, sizes)
    for half in range(2):
        rows, groups = slice(70 * half, 70 * half + 70), slice(2 * half, 2 * half + 2)
        assert_close(d[groups], form.expected_sums(a[rows], b[rows], spans(sizes[groups], 70)))


@pytest.mark.parametrize(
    "kinds",
    [
        (AxisType.Auto, AxisType.Auto),
        (AxisType.Explicit, AxisType.Explicit),
        (AxisType.Explicit, AxisType.Auto),
        (AxisType.Auto, AxisType.Explicit),
    ],
    ids=str,
)
def test_mesh_with_one_axis_manual(mesh, kinds):
    rng = np.random.default_rng(8)
    lhs, rhs = (random_array(rng, *shape, dtype=np.float32) for shape in ((2 * M, 33), (G, 33, 20)))
    cotangent = random_array(rng, 2 * M, 20, dtype=np.float32)
    with mesh(*kinds):
        sharded = jax.shard_map(
            ragged_dot,
            in_specs=(P("x"), P(), P()),
            out_specs=P("x"),
            axis_names={"x"},
            check_vma=True,
        )

        @jax.jit
        def both(lhs, rhs, sizes, cotangent):
            d, pullback = jax.vjp(lambda lhs, rhs: sharded(lhs, rhs, sizes), lhs, rhs)
            return d, *pullback(cotangent)

        on_x = jax.device_put((lhs, cotangent), P("x"))
        d, d_lhs, d_rhs = map(np.asarray, both(on_x[0], rhs, SIZES, on_x[1]))
    rows = ids(SIZES, M)
    weights = Form("k_grouped_bf16_gemm_tn_contiguous")
    parts = []
    for half in (slice(0, M), slice(M, None)):
        assert_close(d[half], RAGGED.expected(lhs[half], rhs, rows))
        assert_close(d_lhs[half], RAGGED.expected(cotangent[half], rhs.swapaxes(1, 2), rows))
        parts.append(weights.expected_sums(lhs[half], cotangent[half], spans(SIZES, M)).value)
    np.testing.assert_allclose(d_rhs, sum(parts), rtol=1e-4, atol=1e-4)


@forms("k_grouped_fp8_gemm_tn_contiguous", "k_grouped_bf16_gemm_nt_contiguous")
def test_k_grouped_with_one_axis_manual(mesh, form):
    a, b = form.sum_problem(10, 64, 128, 70)
    sharded = jax.shard_map(
        lambda a, b, sizes: form.function(a, b, group_sizes=sizes),
        in_specs=(P(None, "x") if "_tn_" in form.name else P("x"), P(), P()),
        out_specs=P(None, "x"),
        axis_names={"x"},
        check_vma=True,
    )
    with mesh(AxisType.Auto):
        d = jax.jit(sharded)(a, b, SIZES)
    assert_close(d, form.expected_sums(a, b, spans(SIZES, 70)))


@pytest.mark.parametrize("jit", [True, False])
def test_result_is_divided_as_asked_for(mesh, jit):
    lhs, rhs = RAGGED.problem(11, M, N, K, G)
    with mesh(AxisType.Explicit):
        to = NamedSharding(jax.sharding.get_mesh(), P(None, "y"))
        for out_sharding in to, to.spec:
            dot = functools.partial(ragged_dot, out_sharding=out_sharding)
            d = (jax.jit(dot) if jit else dot)(jax.device_put(lhs, P("x")), rhs, SIZES)
            assert d.sharding.is_equivalent_to(to, 2)
            assert_close(d, RAGGED.expected(lhs, rhs, ids(SIZES, M)))
    with mesh(AxisType.Auto), pytest.raises(ValueError, match="^ragged_dot: out_sharding is P"):
        ragged_dot(lhs, rhs, SIZES, out_sharding=P("x"))
