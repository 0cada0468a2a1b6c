"""fp8_gemm_nt on a mesh of 2 × 4 CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import assert_close, product, random_like, random_problem

from deepgemm_jax import bf16_gemm_nn, fp8_gemm_nt, fp8_gemm_tn
from deepgemm_jax.gemm import op

gemm = functools.partial(fp8_gemm_nt, preferred_element_type=jnp.float32)


@pytest.fixture
def pieces(monkeypatch):
    """The shapes of A and B in each call that a device makes, as (m, k, n)."""
    seen = set()
    reference = op.fp8_gemm_nt.reference

    def record(params, a, a_scale, b, *rest):
        seen.add((*a.shape, b.shape[-2]))
        return reference(params, a, a_scale, b, *rest)

    monkeypatch.setattr(op.fp8_gemm_nt, "reference", record)
    return seen


def put(x, *spec):
    """Puts an array on the current mesh, divided where its dims allow."""
    mesh = jax.sharding.get_mesh()

    def one(leaf):
        sizes = (
            np.prod([mesh.shape[name] for name in np.atleast_1d(axes)]) if axes else 1
            for axes in spec
        )
        fits = (
            axes if length % size == 0 else None
            for axes, length, size in zip(spec, leaf.shape, sizes, strict=False)
        )
        return jax.device_put(leaf, P(*fits))

    return jax.tree.map(one, x)


KINDS = [
    (AxisType.Auto, AxisType.Auto),
    (AxisType.Explicit, AxisType.Explicit),
    (AxisType.Explicit, AxisType.Auto),
]


# With C on meshes of one type, on which the other tests go without it.
@pytest.mark.parametrize(("kinds", "add"), [*zip(KINDS, (True, True, False), strict=True)], ids=str)
@pytest.mark.parametrize(
    ("a_spec", "b_spec", "d_spec", "piece", "needed"),
    [
        (("x", None), ("y", None), ("x", "y"), (32, 1024, 256), set()),
        ((("x", "y"), None), (None, None), (("x", "y"),), (8, 1024, 1024), set()),
        ((None, None), (("x", "y"), None), (None, ("x", "y")), (64, 1024, 128), set()),
        (("x", "y"), (None, "y"), ("x",), (32, 256, 1024), {"all-reduce"}),
        ((None, "x"), ("y", "x"), (None, "y"), (64, 512, 256), {"all-reduce"}),
        ((None, "y"), (None, None), (), (64, 256, 1024), {"all-reduce"}),
        ((None, None), (None, None), (), (64, 1024, 1024), set()),
    ],
)
def test_division(mesh, pieces, kinds, add, a_spec, b_spec, d_spec, piece, needed):
    a, b = random_problem(0, 64, 1024, 1024)
    c = random_like(0, 64, 1024, 1024, jnp.float32) if add else None
    oracle = product(a, b, c)
    with mesh(*kinds):
        operands = put(a, *a_spec), put(b, *b_spec), put(c, *d_spec)
        # A function of its own, so that no other test's trace is taken from the cache.
        compiled = jax.jit(lambda a, b, c: gemm(a, b, c)).lower(*operands).compile()
        d = compiled(*operands)
        assert pieces == {piece}
        assert collectives(compiled) == needed
        assert d.sharding.is_equivalent_to(NamedSharding(jax.sharding.get_mesh(), P(*d_spec)), 2)
        assert_close(d, oracle)
        assert_close(gemm(*operands), oracle)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_one_block_a_device_of_transposed_operands(mesh, kind):
    one = jnp.float8_e4m3fn(1)
    with mesh(kind):
        a = put((jnp.full((512, 32), one), jnp.ones((4, 32))), "y")
        b = put((jnp.full((512, 48), one), jnp.ones((4, 48))), "y")
        d = jax.jit(lambda a, b: fp8_gemm_tn(a, b))(a, b)
    np.testing.assert_array_equal(d, np.full((32, 48), 512))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("n", "k", "a_spec", "b_spec", "piece"),
    [
        (256, 512, (None, None), ("y", None), (64, 512, 256)),  # 64 columns a device
        (1000, 512, (None, None), ("y", None), (64, 512, 1000)),  # the last block is partial
        (512, 256, (None, "y"), (None, "y"), (64, 256, 512)),  # 64 of K a device
        (512, 656, (None, "x"), (None, "x"), (64, 656, 512)),  # the last block is partial
        (512, 512, ("x", None), ("x", None), (32, 512, 512)),  # both want x: the first has it
    ],
)
def test_what_does_not_divide_stays_whole(mesh, pieces, kind, n, k, a_spec, b_spec, piece):
    a, b = random_problem(1, 64, n, k)
    oracle = product(a, b)
    with mesh(kind):
        a, b = put(a, *a_spec), put(b, *b_spec)
        assert_close(jax.jit(lambda a, b: gemm(a, b))(a, b), oracle)
    assert pieces == {piece}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_manual_mesh(mesh, pieces, kind, check_vma):
    a, b = random_problem(2, 64, 512, 1024)
    c = random_like(2, 64, 512, 1024, jnp.float32)

    def rows_and_columns(a, b, c):
        return gemm(a, b, c)

    def contraction(a, b, c):
        first = jax.lax.axis_index("y") == 0
        return jax.lax.psum(gemm(a, b, jnp.where(first, c, 0)), "y")

    with mesh(kind):
        for function, a_spec, b_spec, d_spec, piece in [
            (rows_and_columns, P("x"), P("y"), P("x", "y"), (32, 1024, 128)),
            (contraction, P("x", "y"), P(None, "y"), P("x"), (32, 256, 512)),
        ]:
            pieces.clear()
            sharded = jax.shard_map(
                function,
                in_specs=(a_spec, b_spec, d_spec),
                out_specs=d_spec,
                check_vma=check_vma,
            )
            d = jax.jit(sharded)(put(a, *a_spec), put(b, *b_spec), put(c, *d_spec))
            assert pieces == {piece}
            assert_close(d, product(a, b, c))


def test_types_follow_what_varies(mesh):
    a, b = random_problem(3, 64, 512, 256)

    def sharded(function, in_specs, out_specs):
        return jax.jit(jax.shard_map(function, in_specs=in_specs, out_specs=out_specs))

    with mesh(AxisType.Auto):
        assert_close(sharded(gemm, (P(), P()), P())(a, b), product(a, b))
        assert_close(sharded(lambda a: gemm(a, b), P("x"), P("x"))(a), product(a, b))
        for in_specs in [(P("x"), P()), (P(), P("x"))]:
            with pytest.raises(ValueError, match="out_specs"):
                sharded(gemm, in_specs, P())(a, b)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_mesh_with_one_axis_manual(mesh, kind):
    a, b = random_problem(4, 64, 512, 256)
    with mesh(kind):
        sharded = jax.shard_map(gemm, in_specs=(P("x"), P()), out_specs=P("x"), axis_names={"x"})
        d = jax.jit(sharded)(put(a, "x"), put(b, "y"))
    assert_close(d, product(a, b))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("axes", "a_spec", "b_spec", "d_spec", "needed"),
    [
        ((0, 0), ("x", "y"), ("x",), ("x", "y"), set()),
        ((0, 0), ("x", None, "y"), ("x", None, "y"), ("x",), {"all-reduce"}),
        ((0, 0), (None, "x"), (None, "y"), (None, "x", "y"), set()),
        ((0, None), ("x",), ("y",), ("x", None, "y"), set()),
        ((0, None), (None, "x"), ("y",), (None, "x", "y"), set()),
        ((0, None), ("x", "y"), (), ("x", "y"), set()),
        ((None, 0), ("x",), ("y",), ("y", "x"), set()),
        ((None, 0), ("x",), (None, "y"), (None, "x", "y"), set()),
        ((None, 0), (), ("x", "y"), ("x", None, "y"), set()),
    ],
)
def test_vmap_on_a_mesh(mesh, kind, axes, a_spec, b_spec, d_spec, needed):
    a, b = random_problem(5, 32, 512, 512, (4,))
    a, b = (
        x if axis == 0 else jax.tree.map(lambda leaf: leaf[0], x)
        for x, axis in zip((a, b), axes, strict=True)
    )
    each = [
        x if axis == 0 else jax.tree.map(lambda leaf: np.stack([leaf] * 4), x)
        for x, axis in zip((a, b), axes, strict=True)
    ]
    with mesh(kind):
        operands = put(a, *a_spec), put(b, *b_spec)
        compiled = jax.jit(jax.vmap(gemm, in_axes=axes)).lower(*operands).compile()
        d = compiled(*operands)
        assert collectives(compiled) == needed
        assert d.sharding.is_equivalent_to(NamedSharding(jax.sharding.get_mesh(), P(*d_spec)), 3)
    assert_close(d, product(*each))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_vmap_and_shard_map_nest(mesh, kind):
    a, b = random_problem(6, 32, 512, 256, (3,))
    with mesh(kind):
        outside, inside = put(a, None, "x"), put(b, None, "y")
        sharded = jax.shard_map(gemm, in_specs=(P("x"), P("y")), out_specs=P("x", "y"))
        assert_close(jax.jit(jax.vmap(sharded))(outside, inside), product(a, b))
        sharded = jax.shard_map(
            jax.vmap(gemm),
            in_specs=(P(None, "x"), P(None, "y")),
            out_specs=P(None, "x", "y"),
        )
        assert_close(jax.jit(sharded)(outside, inside), product(a, b))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_program_that_divides_nothing(mesh, kinds):
    a, b = random_problem(7, 32, 256, 256)
    with mesh(*kinds):
        assert_close(jax.jit(lambda a, b: gemm(a, b))(a, b), product(a, b))
        assert_close(gemm(a, b), product(a, b))


def test_result_that_is_asked_for_in_pieces(mesh, pieces):
    a, b = random_problem(8, 64, 512, 256)
    with mesh(AxisType.Auto):
        d_sharding = NamedSharding(jax.sharding.get_mesh(), P("x", "y"))
        d = jax.jit(lambda a, b: gemm(a, b), out_shardings=d_sharding)(put(a), put(b))
    assert pieces == {(32, 256, 128)}
    assert_close(d, product(a, b))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_operand_that_is_on_no_mesh(mesh, kinds):
    """It comes to that of the others, divided as they are."""
    x, w = (np.ones(shape, jnp.bfloat16) for shape in ((16, 32), (32, 24)))
    c = np.arange(16 * 24).reshape(16, 24).astype(jnp.bfloat16)
    with mesh(*kinds):
        x, w = put(x, "x"), put(w)
        d = jax.jit(lambda x, w, c: bf16_gemm_nn(x, w, c))(x, w, c)
        assert d.sharding.is_equivalent_to(x.sharding, 2)
    np.testing.assert_array_equal(d, (32 + c.astype(np.float32)).astype(jnp.bfloat16))
