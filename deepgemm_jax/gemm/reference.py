"""The GEMMs in plain JAX: what runs where there is no kernel, and the tests' first oracle."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 128


def _sum_of_blocks(a: jax.Array, b: jax.Array, scaled: Callable) -> jax.Array:
    """A Bᵀ block by block of K as the kernel does, so that no operand is ever held in float32 as a
    whole; `scaled(product, block)` is a block's share of the sum."""
    k = b.shape[-1]

    def share(block, width):
        """Of a block `width` deep."""

        def columns(x):
            return jax.lax.dynamic_slice_in_dim(x, block * BLOCK, width, axis=-1)

        # XLA:CPU does not compute every dot of narrower operands. Tensor cores round to TF32, which
        # holds every float8 exactly.
        product = jnp.einsum(
            "...mk,...nk->...mn",
            columns(a).astype(jnp.float32),
            columns(b).astype(jnp.float32),
        )
        return scaled(product, block)

    # The last block stands before the loop: it may be narrower, and gives the sum its type.
    last = (k - 1) // BLOCK
    return jax.lax.fori_loop(
        0, last, lambda block, d: d + share(block, min(BLOCK, k)), share(last, k - last * BLOCK)
    )


def _result(params, d, c):
    if c is not None:
        d += c.astype(jnp.float32)
    return [d.astype(params.preferred_element_type)]


def fp8_gemm_1d1d(params, a, a_scale, b, b_scale, c=None):
    def scaled(product, block):
        scales = (
            jax.lax.dynamic_slice_in_dim(scale, block, 1, axis=-1) for scale in (a_scale, b_scale)
        )
        return product * next(scales) * jnp.swapaxes(next(scales), -1, -2)

    return _result(params, _sum_of_blocks(a, b, scaled), c)


def fp8_gemm_1d2d(params, a, a_scale, b, b_scale, c=None):
    b_scale = jnp.repeat(b_scale, BLOCK, axis=-2)[..., : b.shape[-2], :]
    return fp8_gemm_1d1d(params, a, a_scale, b, b_scale, c)


def fp8_gemm_rows(params, a, a_scale, b, b_scale, c=None):
    d = _sum_of_blocks(a, b, lambda product, block: product)
    return _result(params, d * a_scale[..., :, None] * b_scale[..., None, :], c)


def bf16_gemm(params, a, b, c=None, *, a_dims, b_dims):
    d = jnp.einsum(f"...{a_dims},...{b_dims}->...mn", a, b, preferred_element_type=jnp.float32)
    return _result(params, d, c)


def of_form(scales: str, a_mn_major: bool, b_mn_major: bool) -> Callable:
    if scales == "none":
        dims = {"a_dims": "km" if a_mn_major else "mk", "b_dims": "kn" if b_mn_major else "nk"}
        return functools.partial(bf16_gemm, **dims)
    return {"blocks": fp8_gemm_1d2d, "channels": fp8_gemm_1d1d, "rows": fp8_gemm_rows}[scales]
