"""Values and gradients: against finite differences, against plain formulas, and where exact."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import on_each_platform, put
from training.layers import LAYERS, G, finite_differences, ids_of, relative_error, sizes_of

from deepgemm_jax import Recipe, fp8_dot, grouped_linear, grouped_mlp

M, K, N = 40, 32, 16  # of the small problems, which share what is compiled

on_each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
on_each_recipe = pytest.mark.parametrize("recipe", ["fp8", "bf16"])


@functools.partial(jax.jit, static_argnames=("layer", "recipe"))
def value_and_gradients(layer, operands, d, sizes, offset=None, *, recipe="fp8"):
    """y, and the gradient of Σ y d with respect to each operand."""
    options = {"recipe": recipe} | ({} if offset is None else {"group_offset": offset})
    y, pullback = jax.vjp(lambda *xs: layer.function(*xs, sizes, **options), *operands)
    return y, *pullback(d.astype(y.dtype))


def narrow(arrays, dtype):
    return [x.astype(dtype) for x in arrays]


@on_each_platform
@on_each_recipe
@on_each_layer
def test_against_finite_differences(layer, recipe, platform):
    *operands, d = narrow(layer.problem(0, M, K, N), np.float32)
    sizes = sizes_of("tail", M)
    function = layer.of(sizes, M)
    wanted = function(*operands), *finite_differences(function, operands, d)
    operands, d = put((operands, d), platform)
    found = value_and_gradients(layer, operands, d, sizes, recipe=recipe)
    for x, x_wanted in zip(found, wanted, strict=True):
        assert x.dtype == jnp.float32
        assert relative_error(x, x_wanted) < layer.tolerance[recipe]


@on_each_platform
@pytest.mark.parametrize("groups", ["tail", "one"])
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("fp8_dot", "fp8"),
        ("grouped_linear", "fp8"),
        ("grouped_mlp", "fp8"),
        ("grouped_mlp", "bf16"),
    ],
)
def test_against_a_plain_formula(name, recipe, groups, platform):
    layer, m, n = LAYERS[name], 300, 128 if groups == "tail" else 112
    *operands, d = put(narrow(layer.problem(1, m, 144, n), jnp.bfloat16), platform)
    sizes = sizes_of(groups, m)
    found = value_and_gradients(layer, operands, d, sizes, recipe=recipe)
    with jax.default_matmul_precision("float32"):
        y, pullback = jax.vjp(layer.of(sizes, m, jnp), *narrow(operands, jnp.float32))
        wanted = y, *pullback(d.astype(jnp.float32))
    for x, x_found, x_wanted in zip((d, *operands), found, wanted, strict=True):
        assert x_found.dtype == x.dtype
        assert relative_error(x_found, x_wanted) < layer.tolerance[recipe]


@on_each_platform
@pytest.mark.parametrize("name", ["fp8_dot", "grouped_linear"])
def test_exact_where_quantisation_is(name, platform):
    """Zeros and, in all of a group, one magnitude: any block that holds no more than a group's rows
    is quantised without error."""
    layer, m = LAYERS[name], 300
    sizes = sizes_of("tail", m)
    rng = np.random.default_rng(2)
    x, w, d = (
        rng.integers(-1, 2, shape).astype(np.float32)
        for shape in (*layer.shapes(m, 48, 32), (m, 32))
    )
    if name == "grouped_linear":
        of_group = 2.0 ** (3 * np.arange(G + 1, dtype=np.float32))
        x, w, d = x * of_group[ids_of(sizes, m), None], w * of_group[:G, None, None], d
    found = value_and_gradients(layer, *put(([x, w], d), platform), sizes)
    y, pullback = jax.vjp(layer.of(sizes, m, jnp), x, w)
    for x_found, x_wanted in zip(found, (y, *pullback(d)), strict=True):
        np.testing.assert_allclose(x_found, x_wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("product", ["forward", "dgrad", "wgrad"])
def test_recipe_of_each_product(product):
    layer = LAYERS["grouped_linear"]
    *operands, d = narrow(layer.problem(3, M, K, N), np.float32)
    sizes = sizes_of("tail", M)
    found = value_and_gradients(layer, operands, d, sizes, recipe=Recipe(**{product: "bf16"}))
    y, pullback = jax.vjp(layer.of(sizes, M, jnp), *operands)
    for which, x_found, x_wanted in zip(
        ["forward", "dgrad", "wgrad"], found, (y, *pullback(d)), strict=True
    ):
        error = relative_error(x_found, x_wanted)
        assert error < layer.tolerance["fp8"]
        assert (error < layer.tolerance["bf16"]) == (which == product)


# Rows of no group, and groups of no rows.


@on_each_platform
@pytest.mark.parametrize(
    "recipe",
    ["fp8", "bf16", Recipe(wgrad="bf16"), Recipe(dgrad="bf16")],
    ids=["fp8", "bf16", "wgrad in bf16", "dgrad in bf16"],
)
def test_rows_of_no_group_are_never_looked_at(recipe, platform):
    layer, m = LAYERS["grouped_mlp"], M
    *operands, d = narrow(layer.problem(4, m, K, 128), jnp.bfloat16)
    sizes = sizes_of("tail", m)
    tail = ids_of(sizes, m) < 0

    def run(value):
        rows = [
            np.where(tail.reshape(-1, *[1] * (x.ndim - 1)), x.dtype.type(value), x)
            if x.shape[0] == m
            else x
            for x in (*operands, d)
        ]
        *xs, dy = put(rows, platform)
        return value_and_gradients(layer, xs, dy, sizes, recipe=recipe)

    found, other = run(np.nan), run(3)
    for x, x_other in zip(found, other, strict=True):
        np.testing.assert_array_equal(x, x_other)
        if x.shape[0] == m:
            assert not np.asarray(x)[tail].any()
        else:
            assert not np.asarray(x)[sizes == 0].any()
            assert np.asarray(x)[sizes > 0].any()


@on_each_platform
@on_each_recipe
@on_each_layer
def test_no_rows(layer, recipe, platform):
    *operands, d = put(narrow(layer.problem(6, 0, K, N), jnp.bfloat16), platform)
    found = value_and_gradients(layer, operands, d, sizes_of("tail", 0), recipe=recipe)
    for x, x_found in zip((d, *operands), found, strict=True):
        assert x_found.shape == x.shape
        assert not np.asarray(x_found).any()


@on_each_recipe
@pytest.mark.parametrize("name", ["grouped_linear", "grouped_mlp"])
def test_no_groups(name, recipe):
    *operands, d = narrow(LAYERS[name].problem(7, M, K, N), jnp.bfloat16)
    operands = [x[:0] if x.ndim == 3 else x for x in operands]
    sizes = np.zeros(0, np.int32)
    found = value_and_gradients(LAYERS[name], operands, d, sizes, recipe=recipe)
    for x, x_found in zip((d, *operands), found, strict=True):
        assert x_found.shape == x.shape and x_found.dtype == x.dtype
        assert not np.asarray(x_found).any()


@on_each_recipe
def test_shards_of_the_groups(recipe):
    layer = LAYERS["grouped_mlp"]
    *operands, d = narrow(layer.problem(5, M, K, N), np.float32)
    sizes = sizes_of("tail", M)
    whole = value_and_gradients(layer, operands, d, sizes, recipe=recipe)

    def shard(first):
        part = [x[first : first + G // 2] if x.ndim == 3 else x for x in operands]
        return value_and_gradients(layer, part, d, sizes, np.array([first]), recipe=recipe)

    for x, *parts in zip(whole, shard(0), shard(G // 2), strict=True):
        x_found = np.concatenate(parts) if x.ndim == 3 else sum(parts)
        np.testing.assert_allclose(x_found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"x": np.zeros((8, 32), np.float16)}, TypeError, "x has dtype float16"),
        ({"x": np.zeros(32, np.float32)}, ValueError, "x has shape .* wanted \\(any, any\\)"),
        ({"w_gate_up": np.zeros((2, 48, 64))}, ValueError, "wanted \\(any, 32, any\\)"),
        ({"w_gate_up": np.zeros((2, 32, 48))}, ValueError, "48 columns, wanted a multiple of 32"),
        ({"w_down": None}, TypeError, "w_down is None, wanted an array"),
        ({"w_down": np.zeros((2, 32, 24))}, ValueError, "w_down .* multiples of 16"),
        ({"w_down": np.zeros((3, 32, 16))}, ValueError, "w_down .* wanted \\(2, 32, any\\)"),
        ({"group_sizes": np.zeros(3, int)}, ValueError, "group_sizes has shape"),
        ({"group_sizes": np.zeros(2)}, TypeError, "group_sizes has dtype"),
        ({"group_offset": np.zeros(2, int)}, ValueError, "group_offset has shape"),
        ({"router_weights": np.zeros(7)}, ValueError, "router_weights .* wanted \\(8\\)"),
        ({"recipe": "fp4"}, ValueError, "recipe is 'fp4'"),
        ({"implementation": "gpu"}, ValueError, "implementation is 'gpu'"),
        ({"main_grads": [np.zeros((2, 32, 64))] * 2}, ValueError, "main gradient has shape"),
        ({"main_grads": [np.zeros((2, 32, 64))]}, ValueError, "main_grads has 1 arrays"),
        ({"group_sizes": np.zeros(1, int), "group_offset": 0}, ValueError, "weight has 2 groups"),
    ],
)
def test_bad_input(changed, error, named):
    arguments = {
        "x": np.zeros((8, 32)),
        "w_gate_up": np.zeros((2, 32, 64)),
        "w_down": np.zeros((2, 32, 16)),
        "group_sizes": np.zeros(2, int),
    }
    with pytest.raises(error, match=f"^(grouped_mlp|Recipe): .*{named}"):
        grouped_mlp(**arguments | changed)


def test_bad_recipe():
    with pytest.raises(ValueError, match="Recipe: dgrad is 'fp4', wanted 'fp8' or 'bf16'"):
        Recipe(dgrad="fp4")


def test_sizes_out_of_range_are_reported_if_that_is_wished(monkeypatch, caplog):
    monkeypatch.setenv("DEEPGEMM_JAX_DEBUG_GROUPS", "1")
    x, w = np.zeros((8, 32), np.float32), np.zeros((2, 32, 16), np.float32)
    jax.block_until_ready(grouped_linear(x, w, np.array([-3, 100])))
    jax.effects_barrier()
    said = {record.getMessage() for record in caplog.records}
    assert said == {
        "grouped_linear: negative group_sizes: 1 of them",
        "grouped_linear: group_sizes that add up to more than the 8 rows: 1 of them",
    }


@pytest.mark.parametrize("function", [fp8_dot, grouped_linear, grouped_mlp])
def test_example_of_the_docstring(function):
    (case,) = doctest.DocTestFinder(recurse=False).find(function)
    assert doctest.DocTestRunner().run(case).failed == 0
