"""Dense matrix multiplication with block scales."""

from typing import Any

import jax
import jax.numpy as jnp

from ..scaled import ScaledArray, unpack
from . import op
from .config import Config

Scaled = ScaledArray | tuple[Any, Any]


def fp8_gemm_nt(
    a: Scaled,
    b: Scaled,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    recipe: tuple[int, int, int] | None = None,
    config: Config | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies a row-wise scaled FP8 matrix by a block-wise scaled one, transposed.

    $$D_{mn} = C_{mn} + \sum_{g} s^A_{mg}\, s^B_{\lfloor n/128 \rfloor g}
    \sum_{k \in \text{block } g} A_{mk} B_{nk}$$

    where a block is 128 neighbours along K, of which the last may be fewer. Each block is summed
    by the tensor cores, the blocks among each other in float32. Results are the same bit for bit
    on the same device with the same config.

    Args:
      a: `ScaledArray` or tuple of data, float8_e4m3fn [M, K], and scale,
        float32 [M, ceil(K / 128)].
      b: the same of data, float8_e4m3fn [N, K], and scale,
        float32 [ceil(N / 128), ceil(K / 128)].
      c: None, or what is added: [M, N] of the result's dtype. XLA may let D have its memory if
        nothing else needs it.
      preferred_element_type: the result's dtype, bfloat16 or float32.
      recipe: scale block sizes as DeepGEMM gives them: rows of A, rows of B, K. Only
        (1, 128, 128) for now, which None stands for.
      config: the kernel's config in place of the one that `gemm.config.choose` takes. Parts of a
        K that is divided among devices do not use it.
      implementation: "cuda" for the kernel, "xla" for plain JAX, None for the kernel where there
        is one and plain JAX elsewhere.

    M may be 0; N is at least 16, K a multiple of 16.

    Returns:
      D, [M, N] of `preferred_element_type`.

    Raises:
      TypeError: an operand is no scaled array, or of another dtype.
      ValueError: shapes that do not fit each other or the limits above; a recipe, dtype,
        implementation or config that there is not.
      NotImplementedError: `implementation="cuda"` on a device that the kernel is not made for;
        a derivative is asked for.

    Under `jax.vmap` a batch of A with one B is one GEMM with more rows, one of B with one A is one
    with more columns where N is whole blocks, and any other is one batched GEMM. On a mesh M, N, K
    and the batch may be divided among devices, N and K where whole blocks of 128 fall to each;
    dividing K costs a psum of float32 parts.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, fp8_gemm_nt
        >>> a = ScaledArray(jnp.ones((64, 256), jnp.float8_e4m3fn), jnp.full((64, 2), 0.5))
        >>> b = ScaledArray(jnp.ones((512, 256), jnp.float8_e4m3fn), jnp.full((4, 2), 0.25))
        >>> d = fp8_gemm_nt(a, b)
        >>> print(d.shape, d.dtype, d[0, 0])
        (64, 512) bfloat16 32
    """
    name = "fp8_gemm_nt"
    dtype = jnp.dtype(preferred_element_type)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{name}: preferred_element_type is {dtype}, wanted bfloat16 or float32")
    if recipe not in (None, (1, 128, 128)):
        raise ValueError(f"{name}: recipe is {recipe}, wanted None or (1, 128, 128)")
    operands = [*unpack(name, "a", a), *unpack(name, "b", b)]
    if c is not None:
        operands.append(jnp.asarray(c))
    params = op.GemmParams(
        implementation=implementation, preferred_element_type=dtype, config=config
    )
    return op.fp8_gemm_nt(*operands, params=params)
