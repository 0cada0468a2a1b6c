"""What the layers become for a GPU, told from the lowered text: no GPU is needed."""

import re

import jax
import jax.numpy as jnp
import pytest
from training.layers import LAYERS

from deepgemm_jax import Recipe

M, K, N, G = 700, 256, 128, 4
PRODUCTS = {"fp8_dot": 3, "grouped_linear": 3, "grouped_mlp": 6}


def gemms(name, recipe, **options) -> list[str]:
    """The GEMM kernels' calls in the forward and the backward pass."""
    layer = LAYERS[name]

    def run(operands, options, sizes):
        y, pullback = jax.vjp(
            lambda xs, options: layer.function(*xs, sizes, recipe=recipe, **options),
            operands,
            options,
        )
        return y, pullback(y)

    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in layer.shapes(M, K, N)]
    sizes = jax.ShapeDtypeStruct((G,), jnp.int32)
    traced = jax.jit(run).trace(operands, options, sizes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @deepgemm_jax_gemm.*", text)


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_is_a_kernel_s(name):
    for recipe, in_fp8 in [("fp8", 1), ("bf16", 0), (Recipe(wgrad="bf16"), 2 / 3)]:
        calls = gemms(name, recipe)
        assert len(calls) == PRODUCTS[name]
        assert sum("f8E4M3FN" in call for call in calls) == in_fp8 * len(calls)


def test_a_main_gradient_gives_its_memory_to_the_sum():
    main_grad = jax.ShapeDtypeStruct((G, K, N), jnp.float32)
    for recipe in ("fp8", "bf16"):
        calls = gemms("grouped_linear", recipe, main_grad=main_grad)
        assert len(calls) == 3
        assert sum("output_operand_alias<" in call for call in calls) == 1
