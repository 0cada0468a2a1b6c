"""Dense matrix multiplication of FP8 with scales, and of bfloat16."""

from typing import Any

import jax
import jax.numpy as jnp

from .._core.op import Op, check_implementation
from .._core.signature import Signature
from ..scaled import BLOCK, ScaledArray, unpack
from . import op
from .config import AnyConfig
from .explain import explain
from .layouts import transposed
from .recipes import of_rows, scales_of

__all__ = [
    "bf16_gemm_nn",
    "bf16_gemm_nt",
    "bf16_gemm_tn",
    "bf16_gemm_tt",
    "explain",
    "fp8_gemm_1d1d",
    "fp8_gemm_1d2d",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
]

Scaled = ScaledArray | tuple[Any, Any]

FP8_OPS: dict[str, Op] = {
    "blocks": op.fp8_gemm_nt,
    "channels": op.fp8_gemm_nt_1d1d,
    "rows": op.fp8_gemm_nt_rows,
}


def fp8_gemm_nt(
    a: Scaled,
    b: Scaled,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    recipe: tuple[int, int, int] | None = None,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies two scaled FP8 matrices, the second one transposed.

    $$D_{mn} = C_{mn} + \sum_{g} s^A_{mg}\, s^B_{ng} \sum_{k \in \text{block } g} A_{mk} B_{nk}$$

    The shapes of the scales say which recipe it is:

    | recipe | A's scale | B's scale | a block |
    | --- | --- | --- | --- |
    | (1, 128, 128), or 1d2d | [M, ceil(K/128)] | [ceil(N/128), ceil(K/128)] | 128 of K |
    | (1, 1, 128), or 1d1d | [M, ceil(K/128)] | [N, ceil(K/128)] | 128 of K |
    | (1, 1, 0): rows or tensors | [M, 1] or [1, 1] | [N, 1] or [1, 1] | all of K |

    The last block may be partial. Products are summed by the tensor cores over 128 of K, with the
    last recipe over 512, and those sums among each other in float32. Results are the same bit for
    bit on the same device with the same config.

    Args:
      a: `ScaledArray` or tuple of data, float8_e4m3fn or float8_e5m2 [M, K], and float32 scale.
      b: the same of data [N, K].
      c: None, or what is added, of the result's dtype: [M, N], or [N] or [1, N] for a bias of every
        row. XLA may let D have the memory of the former if nothing else needs it.
      preferred_element_type: the result's dtype, bfloat16 or float32; None is bfloat16.
      recipe: None, or the recipe that the scales must have.
      config: the kernel's config in place of the one that `explain` shows first. Parts of a K that
        is divided among devices do not use it.
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

    The name, the order of the operands and the recipes are DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, fp8_gemm_nt
        >>> a = ScaledArray(jnp.ones((64, 256), jnp.float8_e4m3fn), jnp.full((64, 2), 0.5))
        >>> b = ScaledArray(jnp.ones((512, 256), jnp.float8_e4m3fn), jnp.full((4, 2), 0.25))
        >>> d = fp8_gemm_nt(a, b)
        >>> print(d.shape, d.dtype, d[0, 0])
        (64, 512) bfloat16 32
    """
    return _fp8(
        "fp8_gemm_nt", "nt", a, b, c, preferred_element_type, recipe, config, implementation
    )


def fp8_gemm_nn(
    a: Scaled,
    b: Scaled,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    recipe: tuple[int, int, int] | None = None,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""`fp8_gemm_nt` with B as [K, N]: D = C + A B.

    B's scale lies as B does, [ceil(K/128), ceil(N/128)] for instance. The tensor cores of SM90 want
    FP8 with K contiguous, so one kernel transposes B's data first (`layout_transpose`). To do so
    once for many calls, transpose it yourself and call `fp8_gemm_nt`; `prepare_weight` gives that
    form.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, fp8_gemm_nn
        >>> a = ScaledArray(jnp.ones((64, 256), jnp.float8_e4m3fn), jnp.full((64, 2), 0.5))
        >>> b = ScaledArray(jnp.ones((256, 512), jnp.float8_e4m3fn), jnp.full((2, 4), 0.25))
        >>> print(fp8_gemm_nn(a, b)[0, 0])
        32
    """
    return _fp8(
        "fp8_gemm_nn", "nn", a, b, c, preferred_element_type, recipe, config, implementation
    )


def fp8_gemm_tn(
    a: Scaled,
    b: Scaled,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    recipe: tuple[int, int, int] | None = None,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""`fp8_gemm_nt` with A as [K, M] and B as [K, N]: D = C + Aᵀ B.

    Scales lie as their data do, [ceil(K/128), M] for instance, and data are transposed as
    `fp8_gemm_nn` says. `quantize_transpose` gives the form that needs no transpose.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, fp8_gemm_tn
        >>> x = ScaledArray(jnp.ones((256, 64), jnp.float8_e4m3fn), jnp.full((2, 64), 0.5))
        >>> print(fp8_gemm_tn(x, x)[0, 0])
        64
    """
    return _fp8(
        "fp8_gemm_tn", "tn", a, b, c, preferred_element_type, recipe, config, implementation
    )


def fp8_gemm_tt(
    a: Scaled,
    b: Scaled,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    recipe: tuple[int, int, int] | None = None,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""`fp8_gemm_nt` with A as [K, M]: D = C + Aᵀ Bᵀ.

    A's scale lies as A does, [ceil(K/128), M] for instance, and its data are transposed as
    `fp8_gemm_nn` says.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, fp8_gemm_tt
        >>> a = ScaledArray(jnp.ones((256, 64), jnp.float8_e4m3fn), jnp.full((2, 64), 0.5))
        >>> b = ScaledArray(jnp.ones((512, 256), jnp.float8_e4m3fn), jnp.full((4, 2), 0.25))
        >>> print(fp8_gemm_tt(a, b)[0, 0])
        32
    """
    return _fp8(
        "fp8_gemm_tt", "tt", a, b, c, preferred_element_type, recipe, config, implementation
    )


def fp8_gemm_1d2d(
    a: Scaled,
    b: Scaled,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`fp8_gemm_nt` that takes the recipe (1, 128, 128) alone.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, fp8_gemm_1d2d
        >>> x = ScaledArray(jnp.ones((128, 256), jnp.float8_e4m3fn), jnp.full((128, 2), 0.5))
        >>> w = ScaledArray(jnp.ones((128, 256), jnp.float8_e4m3fn), jnp.full((1, 2), 0.5))
        >>> print(fp8_gemm_1d2d(x, w)[0, 0])
        64
    """
    recipe = (1, BLOCK, BLOCK)
    return _fp8(
        "fp8_gemm_1d2d", "nt", a, b, c, preferred_element_type, recipe, config, implementation
    )


def fp8_gemm_1d1d(
    a: Scaled,
    b: Scaled,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.float32,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`fp8_gemm_nt` that takes the recipe (1, 1, 128) alone. The result is float32 unless said.

    That is also what None for `preferred_element_type` is here.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, fp8_gemm_1d1d
        >>> x = ScaledArray(jnp.ones((128, 256), jnp.float8_e4m3fn), jnp.full((128, 2), 0.5))
        >>> d = fp8_gemm_1d1d(x, x, jnp.ones((128, 128)))
        >>> print(d.dtype, d[0, 0])
        float32 65.0
    """
    name, recipe = "fp8_gemm_1d1d", (1, 1, BLOCK)
    dtype = op.out_dtype(name, preferred_element_type, jnp.float32)
    return _fp8(name, "nt", a, b, c, dtype, recipe, config, implementation)


def bf16_gemm_nt(
    a: Any,
    b: Any,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies two bfloat16 matrices, the second one transposed.

    $$D_{mn} = C_{mn} + \sum_{k} A_{mk} B_{nk}$$

    summed in float32.

    Args:
      a: bfloat16 [M, K].
      b: bfloat16 [N, K].
      c: None, or what is added, as `fp8_gemm_nt` has it, as all that follow.

    Any M, N and K; the kernel takes those whose rows in memory are multiples of 16 bytes, and plain
    JAX the others. Returns, raises and transforms as `fp8_gemm_nt` does, but a mesh may divide N
    and K anywhere. The name is DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import bf16_gemm_nt
        >>> a, b = jnp.ones((4, 16), jnp.bfloat16), jnp.ones((24, 16), jnp.bfloat16)
        >>> d = bf16_gemm_nt(a, b, jnp.arange(24, dtype=jnp.bfloat16))
        >>> print(d.shape, d[0, :3])
        (4, 24) [16 17 18]
    """
    return _bf16("nt", a, b, c, preferred_element_type, config, implementation)


def bf16_gemm_nn(
    a: Any,
    b: Any,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`bf16_gemm_nt` with B as [K, N]: D = C + A B. The tensor cores read it so, uncopied.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import bf16_gemm_nn
        >>> a, b = jnp.ones((4, 16), jnp.bfloat16), jnp.ones((16, 24), jnp.bfloat16)
        >>> print(bf16_gemm_nn(a, b)[0, 0])
        16
    """
    return _bf16("nn", a, b, c, preferred_element_type, config, implementation)


def bf16_gemm_tn(
    a: Any,
    b: Any,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`bf16_gemm_nn` with A as [K, M]: D = C + Aᵀ B.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import bf16_gemm_tn
        >>> a, b = jnp.ones((16, 8), jnp.bfloat16), jnp.ones((16, 24), jnp.bfloat16)
        >>> print(bf16_gemm_tn(a, b).shape)
        (8, 24)
    """
    return _bf16("tn", a, b, c, preferred_element_type, config, implementation)


def bf16_gemm_tt(
    a: Any,
    b: Any,
    c: Any = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    config: AnyConfig | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`bf16_gemm_nt` with A as [K, M]: D = C + Aᵀ Bᵀ.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import bf16_gemm_tt
        >>> a, b = jnp.ones((16, 8), jnp.bfloat16), jnp.ones((24, 16), jnp.bfloat16)
        >>> print(bf16_gemm_tt(a, b).shape)
        (8, 24)
    """
    return _bf16("tt", a, b, c, preferred_element_type, config, implementation)


def _fp8(
    name, layout, a, b, c, preferred_element_type, recipe, config, implementation
) -> jax.Array:
    """Operands are checked as the caller has them, before they are brought into the form "nt"."""
    params = _params(name, preferred_element_type, config, implementation)
    a, b = ScaledArray(*unpack(name, "a", a)), ScaledArray(*unpack(name, "b", b))
    a_turned, b_turned = layout[0] == "t", layout[1] == "n"
    c = _added(layout, a, b, c)
    Signature(
        name,
        {
            "a.data": f"{op.FP8}[{'k m' if a_turned else 'm k'}]",
            "b.data": f"{op.FP8}[{'k n' if b_turned else 'n k'}]",
            "c?": "preferred_element_type[m n]",
        },
        {},
        op.fp8_gemm_nt.signature.limits,
    ).check([a.data, b.data, *c], params)
    for which, x in ("a", a), ("b", b):
        if x.scale.dtype != jnp.float32:
            raise TypeError(f"{name}: {which}.scale has dtype {x.scale.dtype}, wanted float32")

    scales = scales_of(
        name,
        (a.data, a.scale),
        (b.data, b.scale),
        recipe,
        a_mn_major=a_turned,
        b_mn_major=b_turned,
    )
    if a_turned:
        a = transposed(name, "a", a, implementation)
    if b_turned:
        b = transposed(name, "b", b, implementation)
    if scales == "rows":
        a, b = (ScaledArray(x.data, of_rows(x.scale, x.shape[:1])) for x in (a, b))
    return FP8_OPS[scales](a.data, a.scale, b.data, b.scale, *c, params=params)


def _bf16(layout, a, b, c, preferred_element_type, config, implementation) -> jax.Array:
    gemm = getattr(op, f"bf16_gemm_{layout}")
    params = _params(gemm.name, preferred_element_type, config, implementation)
    a, b = jnp.asarray(a), jnp.asarray(b)
    return gemm(a, b, *_added(layout, a, b, c), params=params)


def _params(name, preferred_element_type, config, implementation) -> op.GemmParams:
    check_implementation(name, implementation)
    dtype = op.out_dtype(name, preferred_element_type)
    if not isinstance(config, AnyConfig | None):
        raise ValueError(f"{name}: config is {config!r}, wanted None or one that explain shows")
    return op.GemmParams(implementation, dtype, config)


def _added(layout, a, b, c) -> list[jax.Array]:
    """C, if there is one, with all its rows."""
    if c is None:
        return []
    c = jnp.asarray(c)
    # M and N, as far as the operands have them.
    shape = a.shape[layout[0] == "t" :][:1] + b.shape[layout[1] == "n" :][:1]
    return [jnp.broadcast_to(c, shape) if c.shape in (shape[1:], (1, *shape[1:])) else c]
