"""The GEMM in plain JAX: what runs where there is no kernel, and the tests' first oracle."""

import jax
import jax.numpy as jnp

BLOCK = 128


def fp8_gemm_nt(params, a, a_scale, b, b_scale, c=None):
    """Sums block by block of K as the kernel does, so that no operand is ever held in float32."""
    n, k = b.shape[-2:]

    def product(block, width):
        """One block's product, `width` deep, with its scales."""

        def columns(x):
            return jax.lax.dynamic_slice_in_dim(x, block * BLOCK, width, axis=-1)

        def scale(x):
            return jax.lax.dynamic_slice_in_dim(x, block, 1, axis=-1)

        # bfloat16 holds every float8 exactly, and is the fastest dot where there are tensor cores.
        partial = jnp.einsum(
            "...mk,...nk->...mn",
            columns(a).astype(jnp.bfloat16),
            columns(b).astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
        b_rows = jnp.repeat(scale(b_scale), BLOCK, axis=-2)[..., :n, :]
        return partial * scale(a_scale) * jnp.swapaxes(b_rows, -1, -2)

    # The last block stands before the loop: it may be narrower, and gives the sum its type.
    last = (k - 1) // BLOCK
    d = jax.lax.fori_loop(
        0, last, lambda block, d: d + product(block, min(BLOCK, k)), product(last, k - last * BLOCK)
    )
    if c is not None:
        d += c.astype(jnp.float32)
    return [d.astype(params.preferred_element_type)]
