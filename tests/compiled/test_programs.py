"""Programs as XLA compiles them for GPUs: every op's handler finds a kernel for its operands, and
nothing costs what it need not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemm_forms import FORMS
from gpu_compiler import compiled, h200s, kernels, needs_compiler
from hlo import collectives
from jax import ShapeDtypeStruct as Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from moe.cases import TOKENS, problem, router, value_and_gradients
from training.layers import LAYERS

import deepgemm_jax as dg
from deepgemm_jax._bench.training import peak_bytes
from deepgemm_jax.moe import Axes, moe_layer

pytestmark = needs_compiler

FP8 = jnp.float8_e4m3fn
G = 4


def moved(program) -> list[str]:
    """What XLA does itself between the first operand and the last result."""
    text = program.as_text()
    return re.findall(r" (copy|transpose|fusion|convert)\(", text[text.index("ENTRY") :])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_the_gemm_compiles(form):
    assert "gemm" in kernels(compiled(functools.partial(form.op.bind, form.params), form.operands))


X = Array((256, 512), jnp.bfloat16)
SIZES = Array((G,), jnp.int32)
QUANTISERS = {
    "token": (dg.per_token_cast_to_fp8, [X]),
    "channel": (dg.per_channel_cast_to_fp8, [X]),
    "block": (dg.per_block_cast_to_fp8, [X]),
    "row": (dg.per_row_cast_to_fp8, [X]),
    "tensor": (dg.per_tensor_cast_to_fp8, [X]),
    "both ways": (dg.quantize_transpose, [X]),
    "groups": (dg.quantize_transpose, [X, SIZES]),
    "weight": (functools.partial(dg.prepare_weight, layout="kn", transposed=True), [X]),
    "gated": (dg.swiglu_quantize, [X]),
    "transpose": (dg.layout_transpose, [X]),
}


@pytest.mark.parametrize("name", QUANTISERS)
def test_every_quantiser_compiles(name):
    function, operands = QUANTISERS[name]
    assert kernels(compiled(function, *operands))


def test_a_batch_is_one_call():
    a = dg.ScaledArray(Array((3, 256, 512), FP8), Array((3, 256, 4), jnp.float32))
    b = dg.ScaledArray(Array((3, 384, 512), FP8), Array((3, 3, 4), jnp.float32))
    assert kernels(compiled(jax.vmap(dg.fp8_gemm_nt), a, b)) == ["gemm"]
    batch, matrices = Array((3, *X.shape), X.dtype), Array((G, 512, 256), X.dtype)
    dot = jax.vmap(dg.ragged_dot, (0, None, None))
    assert kernels(compiled(dot, batch, matrices, SIZES)) == ["gemm"]


def test_a_batch_of_grouped_problems_is_one_call():
    lhs, rhs = (Array((3, *x), jnp.bfloat16) for x in ((256, 512), (G, 512, 128)))
    sizes = Array((3, G), jnp.int32)

    def total(lhs, rhs, sizes):
        return (jax.vmap(dg.ragged_dot)(lhs, rhs, sizes).astype(jnp.float32) ** 2).sum()

    gradients = compiled(jax.grad(total, (0, 1)), lhs, rhs, sizes)
    assert kernels(gradients) == ["gemm"] * 3

    a, b = (
        dg.ScaledArray(Array((3, n, 400), FP8), Array((3, n, 4), jnp.float32)) for n in (64, 32)
    )
    sums = jax.vmap(
        lambda a, b, sizes: dg.k_grouped_fp8_gemm_nt_contiguous(a, b, group_sizes=sizes)
    )
    assert kernels(compiled(sums, a, b, sizes)) == ["gemm"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_indexer_compiles(dtype):
    q, kv = Array((8, 64, 128), FP8), (Array((512, 128), FP8), Array((512,), jnp.float32))
    weights, ends = Array((8, 64), jnp.float32), Array((8,), jnp.int32)

    def indices(q, kv, weights, starts, ends):
        logits = dg.fp8_mqa_logits(q, kv, weights, starts, ends, logits_dtype=dtype)
        return dg.indexer_topk(logits, 128)

    assert kernels(compiled(indices, q, kv, weights, ends, ends)) == ["mqa_logits", "topk"]


def test_nothing_stands_between_cast_and_gemm():
    b = dg.ScaledArray(Array((384, 512), FP8), Array((3, 4), jnp.float32))
    program = compiled(lambda x, b: dg.fp8_gemm_nt(dg.per_token_cast_to_fp8(x), b), X, b)
    assert len(kernels(program)) == 2
    assert not moved(program)


def test_what_a_cast_writes_is_mn_major_already():
    def scale(x):
        return dg.get_mn_major_tma_aligned_tensor(dg.per_token_cast_to_fp8(x).scale).sum()

    assert "transpose" not in moved(compiled(scale, X))


def test_a_donated_c_becomes_d():
    a = dg.ScaledArray(Array((256, 512), FP8), Array((256, 4), jnp.float32))
    b = dg.ScaledArray(Array((384, 512), FP8), Array((3, 4), jnp.float32))
    c = Array((256, 384), jnp.float32)
    gemm = functools.partial(dg.fp8_gemm_nt, preferred_element_type=jnp.float32)
    program = compiled(gemm, a, b, c, donate_argnums=2)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == 4 * 256 * 384 > memory.temp_size_in_bytes


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compile_with_their_gradients(name, recipe):
    operands = [Array(shape, jnp.bfloat16) for shape in LAYERS[name].shapes(700, 256, 128)]

    def total(operands, sizes):
        return LAYERS[name].function(*operands, sizes, recipe=recipe).astype(jnp.float32).sum()

    assert "gemm" in kernels(compiled(jax.grad(total), operands, SIZES))


def test_what_layers_keep_takes_less_memory_in_fp8():
    rows, width, gates, layers = 2048, 512, 256, 4
    x = Array((rows, width), jnp.bfloat16)
    weights = [
        Array((layers, G, *shape), jnp.bfloat16) for shape in ((width, 2 * gates), (gates, width))
    ]

    def peak(recipe):
        def total(x, weights, sizes):
            def layer(x, w):
                return x + dg.grouped_mlp(x, *w, sizes, recipe=recipe), None

            return jax.lax.scan(layer, x, weights)[0].astype(jnp.float32).sum()

        return peak_bytes(compiled(jax.grad(total, (0, 1)), x, weights, SIZES))

    assert peak("fp8") < 0.95 * peak("bf16")


@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all", "ragged_all_to_all"])
def test_an_moe_layer_compiles_for_several_gpus(strategy):
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=h200s(4))
    axes = Axes(expert="y", tokens=("x",), fsdp="x")
    x, params, d = problem()
    specs = axes.token_spec(), axes.param_specs(params), axes.token_spec(), axes.token_spec()
    operands = jax.tree.map(
        lambda x, spec: Array(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        (x, params, d, np.ones(TOKENS, bool)),
        specs,
    )

    def layer(x, params, valid):
        return moe_layer(x, params, router, valid=valid, strategy=strategy, axes=axes)

    with jax.set_mesh(mesh):
        sharded = jax.shard_map(layer, in_specs=specs[:2] + specs[3:], out_specs=(specs[0], P()))
        program = value_and_gradients(sharded).lower(*operands).compile()
    assert "gemm" in kernels(program)
    assert strategy.replace("_", "-") in collectives(program)
