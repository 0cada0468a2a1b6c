"""Matrix multiplications of many groups at once, as mixtures of experts need them.

How many rows each group has is data on the device: nothing is compiled anew and nothing waits for
the host when it changes.
"""

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from .._core import sums
from ..gemm.op import out_dtype
from ..scaled import ScaledArray, unpack
from . import groups, op
from .ragged import ragged_dot, ragged_dot_general

__all__ = [
    "k_grouped_bf16_gemm_nt_contiguous",
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "ragged_dot",
    "ragged_dot_general",
]

Scaled = ScaledArray | tuple[Any, Any]


def m_grouped_fp8_gemm_nt_contiguous(
    a: Scaled,
    b: Scaled,
    *,
    m_indices: Any = None,
    group_sizes: Any = None,
    group_offsets: Any = None,
    preferred_element_type: Any = jnp.bfloat16,
    recipe: tuple[int, int, int] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies each row of a scaled FP8 matrix by the matrix of the row's group, transposed.

    $$D_{mn} = \sum_{h} s^A_{mh}\, s^B_{g \lfloor n/128 \rfloor h}
    \sum_{k \in \text{block } h} A_{mk} B_{gnk}, \qquad g = \text{group of row } m$$

    where a block is 128 neighbours along K, of which the last may be fewer. That is the recipe
    (1, 128, 128); the shapes of the scales may say that it is another one of `fp8_gemm_nt`'s.
    Exactly one of `m_indices`, `group_sizes` and `group_offsets` says which rows are whose; the
    latter two spare a search for groups among the rows. No group need be aligned to anything.

    Args:
      a: `ScaledArray` or tuple of data, float8_e4m3fn or float8_e5m2 [M, K], and scale,
        float32 [M, ceil(K / 128)]; or with the recipe (1, 1, 0) [M, 1] or [1, 1].
      b: the same of data [G, N, K], and scale, float32 [G, ceil(N / 128), ceil(K / 128)]; with the
        recipe (1, 1, 128) [G, N, ceil(K / 128)]; with (1, 1, 0) [G, N, 1] or [G, 1, 1].
      m_indices: integers [M], the group of each row, in any order. A row whose group is negative or
        not less than G is padding.
      group_sizes: integers [G], the rows of each group; groups follow each other from the first row
        on. A negative size counts as 0. Where they add up to less than M, the last rows are
        padding; where to more, the groups end with the rows.
      group_offsets: integers [G + 1], the first row of each group, then the last one's end. They
        are clamped to [0, M], and one below an earlier one counts as that one. Rows before the
        first offset and from the last on are padding.
      preferred_element_type: the result's dtype, bfloat16 or float32; None is bfloat16.
      recipe: None, or the recipe that the scales must have.
      implementation: "cuda" for the kernel, "xla" for plain JAX, None for the kernel where there
        is one and plain JAX elsewhere.

    M may be 0; N is at least 16, K a multiple of 16.

    Returns:
      D, [M, N] of `preferred_element_type`. Rows that are padding are zero. With the environment
      variable `DEEPGEMM_JAX_DEBUG_GROUPS` set to anything but 0 when a call is traced, each run of
      it logs a warning if numbers that tell the groups were out of range.

    Raises:
      TypeError: an operand is no scaled array, or of another dtype.
      ValueError: shapes that do not fit each other or the limits above; a recipe, dtype or
        implementation that there is not; none or several of the three spellings.
      NotImplementedError: `implementation="cuda"` on a device that there is no kernel for; a
        derivative is asked for.

    Under `jax.vmap` a batch of A with one B is one call with more rows, any other one with more
    groups. On a mesh M, N, K and the batch may be divided among devices, N and K where whole blocks
    of 128 fall to each; dividing K costs a psum of float32 parts. To divide the groups, see
    `ragged_dot`'s `group_offset`.

    The name and `m_indices` are those of DeepGEMM's function of this name.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, m_grouped_fp8_gemm_nt_contiguous
        >>> a = ScaledArray(jnp.ones((5, 128), jnp.float8_e4m3fn), jnp.ones((5, 1)))
        >>> weights = jnp.ones((2, 16, 128), jnp.float8_e4m3fn)
        >>> b = ScaledArray(weights, jnp.array([0.5, 0.25]).reshape(2, 1, 1))
        >>> d = m_grouped_fp8_gemm_nt_contiguous(a, b, group_sizes=jnp.array([3, 1]))
        >>> print(d.shape, d[:, 0])
        (5, 16) [64 64 64 32 0]
    """
    return _m_grouped_fp8(
        "nt",
        a,
        b,
        (m_indices, group_sizes, group_offsets),
        preferred_element_type,
        recipe,
        implementation,
    )


def m_grouped_fp8_gemm_nn_contiguous(
    a: Scaled,
    b: Scaled,
    *,
    m_indices: Any = None,
    group_sizes: Any = None,
    group_offsets: Any = None,
    preferred_element_type: Any = jnp.bfloat16,
    recipe: tuple[int, int, int] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""`m_grouped_fp8_gemm_nt_contiguous` with each group's matrix the other way round.

    $$D_{mn} = \sum_{h} s^A_{mh}\, s^B_{g h \lfloor n/128 \rfloor}
    \sum_{k \in \text{block } h} A_{mk} B_{gkn}, \qquad g = \text{group of row } m$$

    Args:
      a: as there.
      b: `ScaledArray` or tuple of data [G, K, N], and scale, which lies as they do: float32
        [G, ceil(K / 128), ceil(N / 128)], for instance.
      m_indices: as there, as all that follow.

    B's data are transposed first, in one pass: to do so once for many calls, see `prepare_weight`.
    Returns, raises and transforms as `m_grouped_fp8_gemm_nt_contiguous` does. The name is
    DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, m_grouped_fp8_gemm_nn_contiguous
        >>> a = ScaledArray(jnp.ones((4, 128), jnp.float8_e4m3fn), jnp.ones((4, 1)))
        >>> b = ScaledArray(jnp.ones((2, 128, 16), jnp.float8_e4m3fn), jnp.ones((2, 1, 1)))
        >>> d = m_grouped_fp8_gemm_nn_contiguous(a, b, m_indices=jnp.array([1, -1, 0, 2]))
        >>> print(d.shape, d[:, 0])
        (4, 16) [128 0 128 0]
    """
    return _m_grouped_fp8(
        "nn",
        a,
        b,
        (m_indices, group_sizes, group_offsets),
        preferred_element_type,
        recipe,
        implementation,
    )


def m_grouped_bf16_gemm_nt_contiguous(
    a: Any,
    b: Any,
    *,
    m_indices: Any = None,
    group_sizes: Any = None,
    group_offsets: Any = None,
    preferred_element_type: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies each row of a bfloat16 matrix by the matrix of the row's group, transposed.

    $$D_{mn} = \sum_{k} A_{mk} B_{gnk}, \qquad g = \text{group of row } m$$

    summed in float32.

    Args:
      a: bfloat16 [M, K].
      b: bfloat16 [G, N, K].
      m_indices: as `m_grouped_fp8_gemm_nt_contiguous` has it, as all that follow.

    Any M, N and K; the kernel takes those whose rows in memory are multiples of 16 bytes, and plain
    JAX the others. Returns, raises and transforms as `m_grouped_fp8_gemm_nt_contiguous` does, but
    a mesh may divide N and K anywhere. For a derivative see `ragged_dot`. The name is DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import m_grouped_bf16_gemm_nt_contiguous
        >>> a, b = jnp.ones((4, 16), jnp.bfloat16), jnp.ones((3, 16, 16), jnp.bfloat16)
        >>> d = m_grouped_bf16_gemm_nt_contiguous(a, b, group_offsets=jnp.array([0, 1, 1, 3]))
        >>> print(d.shape, d[:, 0])
        (4, 16) [16 16 16 0]
    """
    return _m_grouped_bf16(
        op.m_grouped_bf16_gemm_nt_contiguous,
        a,
        b,
        (m_indices, group_sizes, group_offsets),
        preferred_element_type,
        implementation,
    )


def m_grouped_bf16_gemm_nn_contiguous(
    a: Any,
    b: Any,
    *,
    m_indices: Any = None,
    group_sizes: Any = None,
    group_offsets: Any = None,
    preferred_element_type: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    r"""`m_grouped_bf16_gemm_nt_contiguous` with each group's matrix the other way round.

    $$D_{mn} = \sum_{k} A_{mk} B_{gkn}, \qquad g = \text{group of row } m$$

    Args:
      a: as there.
      b: bfloat16 [G, K, N].
      m_indices: as there, as all that follow.

    Returns, raises and transforms as `m_grouped_bf16_gemm_nt_contiguous` does. The name is
    DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import m_grouped_bf16_gemm_nn_contiguous
        >>> a, b = jnp.ones((3, 16), jnp.bfloat16), jnp.ones((2, 16, 24), jnp.bfloat16)
        >>> d = m_grouped_bf16_gemm_nn_contiguous(a, b, group_sizes=jnp.array([-1, 2]))
        >>> print(d.shape, d[:, 0])
        (3, 24) [16 16 0]
    """
    return _m_grouped_bf16(
        op.m_grouped_bf16_gemm_nn_contiguous,
        a,
        b,
        (m_indices, group_sizes, group_offsets),
        preferred_element_type,
        implementation,
    )


def m_grouped_fp8_gemm_nt_masked(
    a: Scaled,
    b: Scaled,
    masked_m: Any,
    expected_m: int | None = None,
    *,
    zero_fill: bool = False,
    preferred_element_type: Any = jnp.bfloat16,
    recipe: tuple[int, int, int] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies the first rows of each of a batch of scaled FP8 matrices, transposing the second.

    $$D_{gmn} = \sum_{h} s^A_{gmh}\, s^B_{g \lfloor n/128 \rfloor h}
    \sum_{k \in \text{block } h} A_{gmk} B_{gnk}, \qquad m < \text{masked_m}_g$$

    where a block is 128 neighbours along K, of which the last may be fewer. That is the recipe
    (1, 128, 128); the shapes of the scales may say that it is another one of `fp8_gemm_nt`'s.

    Args:
      a: `ScaledArray` or tuple of data, float8_e4m3fn or float8_e5m2 [G, M, K], and scale,
        float32 [G, M, ceil(K / 128)]; or with the recipe (1, 1, 0) [G, M, 1] or [G, 1, 1].
      b: as `m_grouped_fp8_gemm_nt_contiguous` has it.
      masked_m: integers [G], how many rows of each group count, clamped to [0, M]; or booleans
        [G, M], which rows do: they must be each group's first.
      expected_m: how many rows a group is likely to have, by which a kernel chooses its tiles. The
        result is right whatever it is.
      zero_fill: whether the other rows of the result are zero. If not, they may be anything.
      preferred_element_type: the result's dtype, bfloat16 or float32; None is bfloat16.
      recipe: None, or the recipe that the scales must have.
      implementation: "cuda" for the kernel, "xla" for plain JAX, None for the kernel where there
        is one and plain JAX elsewhere.

    M may be 0; N is at least 16, K a multiple of 16.

    Returns:
      D, [G, M, N] of `preferred_element_type`.

    Raises:
      TypeError: an operand is no scaled array, or of another dtype.
      ValueError: shapes that do not fit each other or the limits above; a recipe, dtype,
        implementation or `expected_m` that there is not.
      NotImplementedError: `implementation="cuda"` on a device that there is no kernel for; a
        derivative is asked for.

    Under `jax.vmap` a batch is one call with more groups. On a mesh G, M, N, K and the batch may be
    divided among devices, N and K where whole blocks of 128 fall to each.

    The name and the arguments up to `expected_m` are those of DeepGEMM's function of this name.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, m_grouped_fp8_gemm_nt_masked
        >>> a = ScaledArray(jnp.ones((2, 3, 128), jnp.float8_e4m3fn), jnp.ones((2, 3, 1)))
        >>> b = ScaledArray(jnp.ones((2, 16, 128), jnp.float8_e4m3fn), jnp.ones((2, 1, 1)))
        >>> d = m_grouped_fp8_gemm_nt_masked(a, b, jnp.array([3, 1]), zero_fill=True)
        >>> print(d.shape, d[1, :, 0])
        (2, 3, 16) [128 0 0]
    """
    name = "m_grouped_fp8_gemm_nt_masked"
    dtype = out_dtype(name, preferred_element_type)
    scales, operands = op.by_recipe(name, unpack(name, "a", a), unpack(name, "b", b), recipe)
    return _masked(
        op.m_grouped_fp8_gemm_nt_masked[scales],
        operands,
        masked_m,
        zero_fill,
        op.MaskedParams(implementation, dtype, expected_m=expected_m),
    )


def m_grouped_bf16_gemm_nt_masked(
    a: Any,
    b: Any,
    masked_m: Any,
    expected_m: int | None = None,
    *,
    zero_fill: bool = False,
    preferred_element_type: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    r"""`m_grouped_fp8_gemm_nt_masked` of bfloat16 matrices.

    $$D_{gmn} = \sum_{k} A_{gmk} B_{gnk}, \qquad m < \text{masked_m}_g$$

    summed in float32.

    Args:
      a: bfloat16 [G, M, K].
      b: bfloat16 [G, N, K].
      masked_m: as there, as all that follow.

    Any M, N and K; the kernel takes those whose rows in memory are multiples of 16 bytes, and plain
    JAX the others. Returns, raises and transforms as `m_grouped_fp8_gemm_nt_masked` does, but a
    mesh may divide N and K anywhere. The name is DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import m_grouped_bf16_gemm_nt_masked
        >>> a, b = jnp.ones((2, 3, 16), jnp.bfloat16), jnp.ones((2, 16, 16), jnp.bfloat16)
        >>> mask = jnp.array([[True, False, False], [True, True, False]])
        >>> d = m_grouped_bf16_gemm_nt_masked(a, b, mask, zero_fill=True)
        >>> print(d.shape, d[1, :, 0])
        (2, 3, 16) [16 16 0]
    """
    return _masked(
        op.m_grouped_bf16_gemm_nt_masked,
        [jnp.asarray(a), jnp.asarray(b)],
        masked_m,
        zero_fill,
        op.MaskedParams(
            implementation,
            out_dtype("m_grouped_bf16_gemm_nt_masked", preferred_element_type),
            expected_m=expected_m,
        ),
    )


def k_grouped_fp8_gemm_tn_contiguous(
    a: Scaled,
    b: Scaled,
    c: Any = None,
    *,
    group_sizes: Any = None,
    group_offsets: Any = None,
    preferred_element_type: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiplies the rows of each group of one scaled FP8 matrix with those of another.

    $$D_{gmn} = C_{gmn} + \sum_{k \in \text{group } g}
    s^A_{\lfloor k/128 \rfloor m} A_{km}\, s^B_{\lfloor k/128 \rfloor n} B_{kn}$$

    It is the gradient of the weights of a contiguous grouped GEMM. Blocks of scales are counted
    from the first row of all: a group may begin and end within one. Exactly one of `group_sizes`
    and `group_offsets` says which rows are whose.

    Args:
      a: `ScaledArray` or tuple of data, float8_e4m3fn or float8_e5m2 [K, M], and
        scale, float32 [ceil(K / 128), M].
      b: the same of data [K, N], and scale, float32 [ceil(K / 128), N].
      c: None, or what is added: [G, M, N] of the result's dtype. XLA may let D have its memory if
        nothing else needs it.
      group_sizes: integers [G], the rows of each group; groups follow each other from the first row
        on. A negative size counts as 0. Where they add up to less than K, the last rows are
        padding; where to more, the groups end with the rows.
      group_offsets: integers [G + 1], the first row of each group, then the last one's end. They
        are clamped to [0, K], and one below an earlier one counts as that one.
      preferred_element_type: the result's dtype, float32 or bfloat16; None is float32.
      implementation: "cuda" for the kernel, "xla" for plain JAX, None for the kernel where there
        is one and plain JAX elsewhere.

    K may be 0; M and N are multiples of 16. Data are transposed first, in one pass:
    `quantize_transpose` gives the form that `k_grouped_fp8_gemm_nt_contiguous` takes as it is.

    Returns:
      D, [G, M, N] of `preferred_element_type`. That of a group with no rows is C, or zero.

    Raises:
      TypeError: an operand is no scaled array, or of another dtype.
      ValueError: shapes that do not fit each other or the limits above; a dtype or implementation
        that there is not; none or both of the two spellings.
      NotImplementedError: `implementation="cuda"` on a device that there is no kernel for; a
        derivative is asked for.

    Under `jax.vmap` a batch of A with one B is one call with more columns, as is one of B with one
    A; any other one with more groups. On a mesh G, M, N and the batch may be divided among devices.

    The name is DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, k_grouped_fp8_gemm_tn_contiguous
        >>> x = ScaledArray(jnp.ones((7, 16), jnp.float8_e4m3fn), jnp.full((1, 16), 0.5))
        >>> d = k_grouped_fp8_gemm_tn_contiguous(x, x, group_sizes=jnp.array([4, 0, 2]))
        >>> print(d.shape, d[:, 0, 0])
        (3, 16, 16) [1.  0.  0.5]
    """
    name = "k_grouped_fp8_gemm_tn_contiguous"
    return _k_grouped(
        op.k_grouped_fp8_gemm_tn_contiguous,
        [*unpack(name, "a", a), *unpack(name, "b", b)],
        0,
        c,
        (group_sizes, group_offsets),
        op.GroupedParams(implementation, out_dtype(name, preferred_element_type, jnp.float32)),
    )


def k_grouped_fp8_gemm_nt_contiguous(
    a: Scaled,
    b: Scaled,
    c: Any = None,
    *,
    group_sizes: Any = None,
    group_offsets: Any = None,
    preferred_element_type: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    r"""`k_grouped_fp8_gemm_tn_contiguous` of matrices the other way round: groups of columns.

    $$D_{gmn} = C_{gmn} + \sum_{k \in \text{group } g}
    s^A_{m \lfloor k/128 \rfloor} A_{mk}\, s^B_{n \lfloor k/128 \rfloor} B_{nk}$$

    Args:
      a: `ScaledArray` or tuple of data [M, K], and scale, float32 [M, ceil(K / 128)].
      b: the same of data [N, K], and scale, float32 [N, ceil(K / 128)].
      c: as there, as all that follow.

    Returns, raises and transforms as `k_grouped_fp8_gemm_tn_contiguous` does. The name is
    DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import ScaledArray, k_grouped_fp8_gemm_nt_contiguous
        >>> x = ScaledArray(jnp.ones((16, 7), jnp.float8_e4m3fn), jnp.ones((16, 1)))
        >>> d = k_grouped_fp8_gemm_nt_contiguous(x, x, group_offsets=jnp.array([1, 3, 7]))
        >>> print(d.shape, d[:, 0, 0])
        (2, 16, 16) [2. 4.]
    """
    name = "k_grouped_fp8_gemm_nt_contiguous"
    return _k_grouped(
        op.k_grouped_fp8_gemm_nt_contiguous,
        [*unpack(name, "a", a), *unpack(name, "b", b)],
        1,
        c,
        (group_sizes, group_offsets),
        op.GroupedParams(implementation, out_dtype(name, preferred_element_type, jnp.float32)),
    )


def k_grouped_bf16_gemm_tn_contiguous(
    a: Any,
    b: Any,
    c: Any = None,
    *,
    group_sizes: Any = None,
    group_offsets: Any = None,
    preferred_element_type: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    r"""`k_grouped_fp8_gemm_tn_contiguous` of bfloat16 matrices.

    $$D_{gmn} = C_{gmn} + \sum_{k \in \text{group } g} A_{km} B_{kn}$$

    Args:
      a: bfloat16 [K, M].
      b: bfloat16 [K, N].
      c: as there, as all that follow.

    Any M, N and K; the kernel takes those whose rows in memory are multiples of 16 bytes, and plain
    JAX the others. Returns, raises and transforms as `k_grouped_fp8_gemm_tn_contiguous` does.
    The name is DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import k_grouped_bf16_gemm_tn_contiguous
        >>> x, c = jnp.ones((7, 16), jnp.bfloat16), jnp.ones((2, 16, 16))
        >>> d = k_grouped_bf16_gemm_tn_contiguous(x, x, c, group_sizes=jnp.array([0, 5]))
        >>> print(d.shape, d[:, 0, 0])
        (2, 16, 16) [1. 6.]
    """
    name = "k_grouped_bf16_gemm_tn_contiguous"
    return _k_grouped(
        op.k_grouped_bf16_gemm_tn_contiguous,
        [jnp.asarray(a), jnp.asarray(b)],
        0,
        c,
        (group_sizes, group_offsets),
        op.PlainParams(implementation, out_dtype(name, preferred_element_type, jnp.float32)),
    )


def k_grouped_bf16_gemm_nt_contiguous(
    a: Any,
    b: Any,
    c: Any = None,
    *,
    group_sizes: Any = None,
    group_offsets: Any = None,
    preferred_element_type: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    r"""`k_grouped_fp8_gemm_nt_contiguous` of bfloat16 matrices.

    $$D_{gmn} = C_{gmn} + \sum_{k \in \text{group } g} A_{mk} B_{nk}$$

    Args:
      a: bfloat16 [M, K].
      b: bfloat16 [N, K].
      c: as there, as all that follow.

    Any M, N and K; the kernel takes those whose rows in memory are multiples of 16 bytes, and plain
    JAX the others. Returns, raises and transforms as `k_grouped_fp8_gemm_tn_contiguous` does.
    The name is DeepGEMM's.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import k_grouped_bf16_gemm_nt_contiguous
        >>> x = jnp.ones((16, 7), jnp.bfloat16)
        >>> d = k_grouped_bf16_gemm_nt_contiguous(x, x, group_sizes=jnp.array([4, 9]))
        >>> print(d.shape, d[:, 0, 0])
        (2, 16, 16) [4. 3.]
    """
    name = "k_grouped_bf16_gemm_nt_contiguous"
    return _k_grouped(
        op.k_grouped_bf16_gemm_nt_contiguous,
        [jnp.asarray(a), jnp.asarray(b)],
        1,
        c,
        (group_sizes, group_offsets),
        op.PlainParams(implementation, out_dtype(name, preferred_element_type, jnp.float32)),
    )


def _m_grouped_fp8(layout, a, b, rows_of_groups, preferred_element_type, recipe, implementation):
    name = f"m_grouped_fp8_gemm_{layout}_contiguous"
    params = op.GroupedParams(implementation, out_dtype(name, preferred_element_type))
    pairs = unpack(name, "a", a), unpack(name, "b", b)
    scales, operands = op.by_recipe(name, *pairs, recipe, b_mn_major=layout == "nn")
    return _m_grouped(getattr(op, name)[scales], operands, operands[2], rows_of_groups, params)


def _m_grouped_bf16(which, a, b, rows_of_groups, preferred_element_type, implementation):
    params = op.PlainParams(implementation, out_dtype(which.name, preferred_element_type))
    operands = [jnp.asarray(a), jnp.asarray(b)]
    return _m_grouped(which, operands, operands[1], rows_of_groups, params)


def _m_grouped(which, operands, b, rows_of_groups, params):
    # What has no such dims is for the op to complain of.
    rows, count = (x.shape[0] if x.ndim else 0 for x in (operands[0], b))
    m_indices, group_sizes, group_offsets = rows_of_groups
    groups.exactly_one(
        which.name, m_indices=m_indices, group_sizes=group_sizes, group_offsets=group_offsets
    )
    if m_indices is not None:
        ids = groups.row_ids(which.name, rows, count, m_indices)
        return which.by_id(*operands, ids, params=params)
    spans = groups.row_spans(which.name, rows, count, group_sizes, group_offsets)
    return which.in_order(*operands, *spans, params=params)


def _masked(which, operands, masked_m, zero_fill, params):
    expected_m = params.expected_m
    if expected_m is not None and (not isinstance(expected_m, Integral) or expected_m < 0):
        raise ValueError(f"{which.name}: expected_m is {expected_m!r}, wanted None or an int >= 0")
    if operands[0].ndim != 3:
        raise ValueError(f"{which.name}: a has shape {operands[0].shape}, wanted 3 dimensions")
    shape = operands[0].shape[:2]
    masked_m = jnp.asarray(masked_m)
    if masked_m.dtype == bool:
        if masked_m.shape != shape:
            raise ValueError(
                f"{which.name}: masked_m has shape {masked_m.shape}, wanted {shape} of booleans"
            )
        counted, mask = masked_m.sum(1, dtype=jnp.int32), masked_m
        apart = mask != (jnp.arange(shape[1])[None] < counted[:, None])
        groups.report(which.name, "rows of masked_m that are not their group's first", apart)
        masked_m = counted
    masked_m = groups.integers(which.name, "masked_m", masked_m, shape[:1])
    rows = shape[1]
    wide = sums.widen(masked_m)
    outside = (wide < 0) | (wide > rows)
    groups.report(which.name, f"masked_m outside of 0 to {rows}", outside)
    masked_m = sums.clamp(masked_m, rows)
    d = which(*operands, masked_m, params=params)
    if not zero_fill:
        return d
    valid = jnp.arange(rows)[None] < masked_m[:, None]
    return jnp.where(valid[..., None], d, jnp.zeros((), d.dtype))


def _k_grouped(which, operands, axis, c, rows_of_groups, params):
    k = operands[0].shape[axis] if operands[0].ndim > axis else 0
    group_sizes, group_offsets = rows_of_groups
    groups.exactly_one(which.name, group_sizes=group_sizes, group_offsets=group_offsets)
    spans = groups.row_spans(which.name, k, None, group_sizes, group_offsets)
    accumulated = [] if c is None else [jnp.asarray(c)]
    return which(*operands, *spans, *accumulated, params=params)
