"""The layers under JAX's transformations, and what crosses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from training.layers import LAYERS, G, relative_error, sizes_of

from deepgemm_jax import Recipe, fp8_dot, grouped_linear, grouped_mlp

M, K, N = 40, 32, 16
SIZES = sizes_of("tail", M)
LAYER = LAYERS["grouped_mlp"]


def problem(seed: int, *batch: int):
    """Operands of a grouped MLP whose result is as wide as its input, and a gradient."""
    shapes = *LAYER.shapes(M, K, K), (M, K)
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(*batch, *shape)) / (K**0.5 if len(shape) == 3 else 1)).astype(np.float32)
        for shape in shapes
    ]


def loss(x, gate_up, down, router_weights, d, sizes=SIZES, **options):
    return (grouped_mlp(x, gate_up, down, sizes, router_weights, **options) * d).sum()


gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)), static_argnames="recipe")


def assert_close(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative_error(x, y) < 1e-5


def test_vmap_of_rows_and_of_all():
    x, gate_up, down, router_weights, d = problem(0, 2)
    each = [gradients(x[i], gate_up[0], down[0], router_weights[i], d[i]) for i in range(2)]
    dx, *d_weights, d_router_weights = (np.stack(xs) for xs in zip(*each, strict=True))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def of_rows(x, gate_up, down, router_weights, d):
        losses = jax.vmap(loss, (0, None, None, 0, 0))(x, gate_up, down, router_weights, d)
        return losses.sum()

    found = of_rows(x, gate_up[0], down[0], router_weights, d)
    assert_close(found, (dx, *(dw.sum(0) for dw in d_weights), d_router_weights))

    second = gradients(x[1], gate_up[1], down[1], router_weights[1], d[1])
    found = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2, 3))))(x, gate_up, down, router_weights, d)
    assert_close([g[1] for g in found], list(second))


LAYERS_IN_SCAN = 2


def through_layers(run_layer, x, parameters, d):
    """The sum of d times what comes out of some layers with residual connections."""

    def layer(x, parameters):
        return x + grouped_mlp(x, *parameters[:2], SIZES, parameters[2]), None

    return (run_layer(layer, x, parameters) * d).sum()


def unrolled(layer, x, parameters):
    for i in range(LAYERS_IN_SCAN):
        x, _ = layer(x, [p[i] for p in parameters])
    return x


def remat(policy):
    def run(layer, x, parameters):
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jax.lax.scan(layer, x, parameters)[0]

    return run


def test_scan_and_remat():
    x, *parameters, d = problem(1, LAYERS_IN_SCAN)
    x, d = x[0], d[0]
    policies = [None, jax.checkpoint_policies.save_only_these_names("deepgemm_jax.activations")]
    found, *others = (
        jax.jit(jax.grad(functools.partial(through_layers, run), (0, 1)))(x, parameters, d)
        for run in (unrolled, *map(remat, policies))
    )
    for other in others:
        assert_close(other, found)


# Meshes.


def test_shard_map_over_rows(mesh):
    """Each device has its own rows and groups' sizes, all have the same weights."""
    devices = 8
    x, gate_up, down, router_weights, d = problem(2, devices)
    gate_up, down = gate_up[0], down[0]
    sizes = np.stack([np.roll(SIZES, i) for i in range(devices)])
    each = [
        gradients(x[i], gate_up, down, router_weights[i], d[i], sizes[i]) for i in range(devices)
    ]
    wanted = (
        np.stack([g[0] for g in each]),
        *(sum(np.asarray(g[i]) for g in each) for i in (1, 2)),
        np.stack([g[3] for g in each]),
    )
    with mesh(AxisType.Auto):

        @jax.jit
        @jax.shard_map(
            in_specs=(P(("x", "y")), P(), P(), *[P(("x", "y"))] * 3),
            out_specs=(P(("x", "y")), P(), P(), P(("x", "y"))),
            check_vma=True,
        )
        def run(x, gate_up, down, router_weights, d, sizes):
            rows = (x[0], gate_up, down, router_weights[0], d[0], sizes[0])
            dx, *d_weights, d_router = jax.grad(loss, (0, 1, 2, 3))(*rows)
            return dx[None], *d_weights, d_router[None]

        assert_close(run(x, gate_up, down, router_weights, d, sizes), wanted)


def test_shard_map_over_groups(mesh):
    """Each device has a group's weights and all rows."""
    x, *weights, router_weights, d = problem(3)
    wanted = gradients(x, *weights, router_weights, d)
    with mesh(AxisType.Auto):

        @jax.jit
        @jax.grad
        def run(operands):
            @jax.shard_map(in_specs=(P(), P("y"), P("y"), P(), P()), out_specs=P())
            def shard(x, gate_up, down, router_weights, d):
                offset = jax.lax.axis_index("y") * (G // 4)
                part = loss(x, gate_up, down, router_weights, d, group_offset=offset)
                return jax.lax.psum(part, "y")

            return shard(*operands, d)

        assert_close(tuple(run((x, *weights, router_weights))), wanted)


@pytest.mark.parametrize(
    "recipe", ["fp8", "bf16", Recipe(wgrad="bf16")], ids=["fp8", "bf16", "wgrad in bf16"]
)
@pytest.mark.parametrize(
    ("axes", "specs"),
    [
        (AxisType.Auto, (P(), P(None, "x", "y"), P(None, "y", "x"), P())),
        (AxisType.Explicit, (P("x"), P("y"), P("y"), P("y"))),
    ],
    ids=["Auto", "Explicit"],
)
def test_meshes_that_jit_knows(mesh, axes, specs, recipe):
    *operands, d = problem(11)
    wanted = gradients(*operands, d, recipe=recipe)
    with mesh(axes):
        put = [
            jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))
            for x, spec in zip(operands, specs, strict=True)
        ]
        found = gradients(*put, d, recipe=recipe)
        assert_close(found, wanted)
        if axes == AxisType.Explicit:
            for x, dx in zip(put, found, strict=True):
                assert dx.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y")], ids=str)
def test_which_dim_of_rows_an_explicit_mesh_divides(mesh, spec):
    rng = np.random.default_rng(12)
    x, w, d = (rng.normal(size=shape) for shape in ((2, 8, 128), (128, 32), (2, 8, 32)))
    x, w, d = (jnp.asarray(array, jnp.float32) for array in (x, w, d))
    both = jax.value_and_grad(lambda x: (fp8_dot(x, w) * d).sum())
    value, wanted = both(x)
    with mesh(AxisType.Explicit):
        x = jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))
        found_value, found = jax.jit(both)(x)
        assert found.sharding.is_equivalent_to(x.sharding, 3)
    np.testing.assert_allclose(found_value, value, 1e-5)
    np.testing.assert_array_equal(found, wanted)


# Main gradients.


def test_main_gradients_are_added_to_in_place():
    x, *weights, router_weights, d = problem(4)
    _, *wanted, _ = gradients(x, *weights, router_weights, d)
    before = [np.full(w.shape, 0.5, np.float32) for w in weights]

    @functools.partial(jax.jit, donate_argnums=0)
    @jax.grad
    def accumulated(main_grads, x, gate_up, down, router_weights, d):
        return loss(x, gate_up, down, router_weights, d, main_grads=main_grads)

    main_grads = jax.device_put(before)
    found = accumulated(main_grads, x, *weights, router_weights, d)
    assert_close(found, [0.5 + dw for dw in wanted])
    assert all(main_grad.is_deleted() for main_grad in main_grads)


def test_main_gradients_through_microbatches_and_layers():
    x, w = (a.astype(np.float32) for a in LAYERS["grouped_linear"].problem(5, M, K, K)[:2])
    dense = w[0]
    batches = np.stack([x, x[::-1]])

    def loss(weights, main_grads, x):
        y = grouped_linear(x, weights[0], SIZES, main_grad=main_grads[0])
        return (fp8_dot(y, weights[1], recipe="bf16", main_grad=main_grads[1]) ** 2).sum()

    @jax.jit
    def accumulated(weights, batches):
        def step(main_grads, x):
            return jax.grad(loss, 1)(weights, main_grads, x), None

        zeros = [jnp.zeros(w.shape) for w in weights]
        return jax.lax.scan(step, zeros, batches)[0]

    plain = jax.jit(jax.grad(lambda weights, x: loss(weights, (None, None), x)))
    each = [plain([w, dense], x) for x in batches]
    assert_close(accumulated([w, dense], batches), [a + b for a, b in zip(*each, strict=True)])


def test_main_gradients_that_would_be_counted_twice(mesh):
    x, w, d = (a.astype(np.float32) for a in LAYERS["fp8_dot"].problem(6, 8, K, N))
    main_grad = np.zeros(w.shape, np.float32)

    def dw(main_grad, x):
        y = functools.partial(fp8_dot, x, w, recipe="bf16")
        return jax.grad(lambda main_grad: y(main_grad=main_grad).sum())(main_grad)

    with pytest.raises(ValueError, match="the same for a batch"):
        jax.vmap(dw, (None, 0))(main_grad, x[:, None])
    stacked = jax.vmap(dw)(np.stack([main_grad] * 8), x[:, None])
    assert_close(stacked.sum(0), dw(main_grad, x))
    shard = functools.partial(jax.shard_map, out_specs=P("y"))
    with mesh(AxisType.Auto):
        with pytest.raises(ValueError, match="fp8_dot: the main gradient is the same along .*'y'"):
            shard(dw, in_specs=(P(), P("y")))(main_grad, x)
        own = shard(lambda *xs: dw(*xs)[None], in_specs=(P("y"), P("y")))
        found = own(np.concatenate([main_grad] * 4), x)
    assert_close(found.sum(0), dw(main_grad, x))


# What autodiff sees.


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


NARROW = {jnp.dtype(dtype) for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.uint8)}


def test_nothing_narrow_is_differentiated():
    x, *parameters, d = problem(7, LAYERS_IN_SCAN)
    of_loss = functools.partial(through_layers, remat(None))
    found = 0
    for equation in equations(jax.make_jaxpr(of_loss)(x[0], parameters, d[0]).jaxpr):
        if equation.primitive.name.startswith("custom_vjp"):
            found += 1
            types = {v.aval.dtype for v in (*equation.invars, *equation.outvars)}
            assert not types & NARROW
    assert found == 1
    # A scan backwards gives nothing but cotangents.
    backward = jax.make_jaxpr(jax.grad(of_loss, (0, 1)))(x[0], parameters, d[0])
    [scan] = [e for e in equations(backward.jaxpr) if e.params.get("reverse")]
    assert not {v.aval.dtype for v in scan.outvars} & NARROW
    gradient = jax.grad(loss, argnums=5, allow_int=True)(*problem(8), SIZES)
    assert gradient.dtype == jax.dtypes.float0


def residuals(function, *operands):
    """The types of what the gradient needs of the forward pass."""
    return jax.tree.leaves(jax.eval_shape(lambda *xs: jax.vjp(function, *xs)[1], *operands))


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_what_is_kept_until_the_gradient(recipe):
    """Activations in FP8, or bfloat16, beside what the layer was given."""
    *operands, _ = (x.astype(jnp.bfloat16) for x in problem(9))
    kept = residuals(lambda *xs: grouped_mlp(*xs[:3], SIZES, xs[3], recipe=recipe), *operands)
    given = {w.shape for w in operands[1:]}
    kept = [x for x in kept if x.size >= M * K and x.shape not in given]
    name = {"fp8": "float8_e4m3fn", "bf16": "bfloat16"}[recipe]
    assert [x.dtype.name for x in kept] == [name, name]


def test_what_a_policy_keeps():
    *operands, _ = problem(10)

    def kept(policy):
        layer = jax.checkpoint(lambda *xs: grouped_mlp(*xs[:3], SIZES, xs[3]), policy=policy)
        return sum(x.dtype == jnp.float8_e4m3fn for x in residuals(layer, *operands))

    assert kept(None) == 0
    assert kept(jax.checkpoint_policies.save_only_these_names("deepgemm_jax.activations")) == 2
