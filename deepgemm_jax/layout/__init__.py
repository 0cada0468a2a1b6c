"""Scales in the memory layouts that kernels read, by the names that DeepGEMM has for them.

An array of JAX has a shape and, in a compiled program, a memory layout that XLA chooses. What is
MN-major here keeps its shape, [..., MN, K / 128], and asks XLA to lay neighbours along MN side by
side; whatever computes it then writes it so, and nothing is copied. The GEMMs ask that for
themselves: a scale as it comes from `deepgemm_jax.quantize` is in place already.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from .._core import sums
from .._core.device import cuda_device
from ..scaled import BLOCK, PACKED, pack_ue8m0
from . import op


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """The least length from x on whose bytes are a multiple of 16, as TMA wants of a stride.

    Args:
      x: a number of elements.
      element_size: the bytes that one has: 1, 2, 4, 8 or 16.

    Raises:
      ValueError: x is negative, or no such element.

    Example:

        >>> get_tma_aligned_size(5, 4)
        8
    """
    if element_size not in (1, 2, 4, 8, 16):
        raise ValueError(
            f"get_tma_aligned_size: element_size is {element_size}, wanted 1, 2, 4, 8 or 16"
        )
    if x < 0:
        raise ValueError(f"get_tma_aligned_size: x is {x}, wanted at least 0")
    elements = 16 // element_size
    return -(-x // elements) * elements


def get_mk_alignment_for_contiguous_layout() -> int:
    """The multiple of rows at which groups had best begin: no tile then holds rows of two.

    Example:

        >>> get_mk_alignment_for_contiguous_layout()
        128
    """
    return BLOCK


def get_mn_major_tma_aligned_tensor(sf: Any) -> jax.Array:
    """Scales with neighbours along MN side by side in memory, as kernels for SM90 read them.

    Args:
      sf: float32 or int32 [MN, S] or [G, MN, S].

    Returns:
      The same array. Where a jitted program computes and uses it, it is written so at once; what
      the program returns is row-major. It is not padded: only a length of MN that
      `get_tma_aligned_size` leaves as it is makes rows that TMA can read, which no kernel of this
      package needs.

    Raises:
      TypeError, ValueError: sf is not such an array.

    Example:

        >>> import jax.numpy as jnp
        >>> get_mn_major_tma_aligned_tensor(jnp.ones((256, 56))).shape
        (256, 56)
    """
    sf = _scales("get_mn_major_tma_aligned_tensor", sf, (jnp.float32, jnp.int32))
    return _mn_major(sf)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Any) -> jax.Array:
    """Scales as UE8M0, four to an int32, MN-major, as kernels for SM100 read them.

    Args:
      sf: float32 [MN, S] or [G, MN, S], powers of two. Any other number becomes UE8M0's NaN:
        rounding it would change what the data stand for.

    Returns:
      int32 [..., MN, ceil(S / 4)], MN-major as `get_mn_major_tma_aligned_tensor` explains. The
      first of four scales is the lowest byte.

    Raises:
      TypeError, ValueError: sf is not such an array.

    Example:

        >>> import jax.numpy as jnp
        >>> sf = get_mn_major_tma_aligned_packed_ue8m0_tensor(jnp.full((128, 6), 0.5))
        >>> print(sf.shape, [hex(x) for x in sf[0]])
        (128, 2) ['0x7e7e7e7e', '0x7e7e']
    """
    sf = _scales("get_mn_major_tma_aligned_packed_ue8m0_tensor", sf, (jnp.float32,))
    return _mn_major(pack_ue8m0(sf))


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Any, group_sizes: Any) -> jax.Array:
    """Scales along a contracted dim that is divided into groups, packed within each group.

    Args:
      sf: float32 [S, MN], powers of two: a row of scales for every 128 of K, groups one after
        another, each of which has ceil(size / 128) rows.
      group_sizes: integers [G], how much of K each group has: on the device, and free to change
        without compiling again. Sizes below 0 count as 0.

    Returns:
      int32 [S // 4 + G, MN], which is enough for any sizes: of each group ceil(size / 512) rows,
      one after another, that hold its scales and zeros where it has none left. Row-major, which for
      this order of dims is MN-major.

    Raises:
      TypeError, ValueError: operands are not such arrays.

    Example:

        >>> import jax.numpy as jnp
        >>> sf = jnp.array([[1.0], [2.0], [4.0]])
        >>> packed = get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, jnp.array([256, 1]))
        >>> [hex(x) for x in packed[:, 0]]
        ['0x807f', '0x81']
    """
    name = "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor"
    sf = _scales(name, sf, (jnp.float32,))
    sizes = jnp.asarray(group_sizes)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"{name}: group_sizes has dtype {sizes.dtype}, wanted integers")
    if sf.ndim != 2 or sizes.ndim != 1 or not len(sizes):
        raise ValueError(
            f"{name}: group_sizes has shape {sizes.shape} for sf of shape {sf.shape}, "
            "wanted at least one group, in 1 dimension for 2"
        )
    rows = sf.shape[0]
    # Each size alone is cut first: no sum can come round.
    blocks = (sums.clamp(sizes, rows * BLOCK) + BLOCK - 1) // BLOCK
    words = (blocks + PACKED - 1) // PACKED
    last_words = jnp.cumsum(words)
    word = jnp.arange(rows // PACKED + len(sizes), dtype=jnp.int32)
    group = jnp.minimum(sums.rank(last_words, word), len(sizes) - 1)
    first = (word - (last_words - words)[group]) * PACKED
    within = first[:, None] + jnp.arange(PACKED, dtype=jnp.int32)[None]
    row = (jnp.cumsum(blocks) - blocks)[group][:, None] + within
    row = jnp.where(within < blocks[group][:, None], row, rows)
    # The scale whose exponent is 0 stands where there is none.
    gathered = jnp.pad(sf, ((0, 1), (0, 0)))[row]
    return pack_ue8m0(jnp.swapaxes(gathered, 1, 2))[..., 0]


def transform_sf_into_required_layout(
    sf: Any,
    mn: int,
    k: int,
    recipe: tuple[int, int],
    num_groups: int | None = None,
    *,
    arch: str | None = None,
) -> jax.Array:
    """The form in which the kernels of a GPU read the scales of an operand.

    Args:
      sf: float32, or packed int32 as `get_mn_major_tma_aligned_packed_ue8m0_tensor` gives it:
        [ceil(mn / recipe[0]), scales along K], with the groups in front if there are any.
      mn: the operand's rows.
      k: its columns.
      recipe: how many rows and columns share a scale: (1, 128) or (128, 128).
      num_groups: None, or the number of groups.
      arch: as `python -m deepgemm_jax info` names it, "sm_90a" for instance; None for this
        process's GPU.

    Returns:
      For SM90, float32: (1, 128) MN-major, (128, 128) as it is. For SM100, packed int32 of every
      row, MN-major, [..., mn, ceil(k / 512)].

    Raises:
      TypeError, ValueError: sf is of another dtype or shape, or packed for SM90; a recipe or arch
        that there is not.

    Example:

        >>> import jax.numpy as jnp
        >>> sf = jnp.ones((2, 8))
        >>> transform_sf_into_required_layout(sf, 256, 1024, (128, 128), arch="sm_100a").shape
        (256, 2)
    """
    name = "transform_sf_into_required_layout"
    arch = arch or cuda_device().arch
    if arch not in ("sm_90a", "sm_100a"):
        raise ValueError(f"{name}: arch is {arch!r}, wanted 'sm_90a' or 'sm_100a'")
    if tuple(recipe) not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"{name}: recipe is {recipe}, wanted (1, 128) or (128, 128)")
    sf = _scales(name, sf, (jnp.float32, jnp.int32))
    packed = sf.dtype == jnp.int32
    if packed and arch == "sm_90a":
        raise TypeError(f"{name}: sf has dtype int32, wanted float32 for {arch}")
    rows, columns = recipe[0], BLOCK * PACKED if packed else BLOCK
    groups = () if num_groups is None else (num_groups,)
    wanted = (*groups, -(-mn // rows), -(-k // columns))
    if sf.shape != wanted:
        raise ValueError(f"{name}: sf has shape {sf.shape}, wanted {wanted}")
    if arch == "sm_90a":
        return _mn_major(sf) if rows == 1 else sf
    if rows == BLOCK:
        sf = jnp.repeat(sf, BLOCK, axis=-2)[..., :mn, :]
    return _mn_major(sf if packed else pack_ue8m0(sf))


def layout_transpose(x: Any, *, implementation: str | None = None) -> jax.Array:
    """Interchanges the last two dims, in memory too.

    A kernel of its own. `jnp.swapaxes` is better where XLA can make the transposition part of what
    computes its operand or takes its result.

    Args:
      x: [M, N] or [B, M, N], with elements of 1, 2 or 4 bytes.
      implementation: "xla" for plain JAX, "cuda" for a kernel, None for whichever there is.

    Returns:
      [N, M] or [B, N, M].

    Raises:
      TypeError, ValueError: x is not such an array.
      NotImplementedError: `implementation="cuda"` where there is no kernel, which wants rows and
        columns of whole 16 bytes.

    Example:

        >>> import jax.numpy as jnp
        >>> layout_transpose(jnp.ones((2, 3, 4), jnp.bfloat16)).shape
        (2, 4, 3)
    """
    x = jnp.asarray(x)
    if x.dtype.itemsize not in (1, 2, 4):
        raise TypeError(f"layout_transpose: x has dtype {x.dtype}, wanted 1, 2 or 4 bytes")
    if x.ndim not in (2, 3):
        raise ValueError(f"layout_transpose: x has shape {x.shape}, wanted 2 or 3 dimensions")
    return _transpose(x, implementation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _transpose(x: jax.Array, implementation: str | None) -> jax.Array:
    transpose = functools.partial(
        op.layout_transpose, params=op.TransposeParams(implementation, x.dtype)
    )
    return transpose(x) if x.ndim == 2 else jax.vmap(transpose)(x)


@_transpose.defjvp
def _transpose_jvp(implementation, primals, tangents):
    # What JAX can transpose in its turn.
    (x,), (tangent,) = primals, tangents
    return _transpose(x, implementation), jnp.swapaxes(tangent, -1, -2)


def _mn_major(sf: jax.Array) -> jax.Array:
    *outer, mn, k = range(sf.ndim)
    sf = with_layout_constraint(sf, Layout((*outer, k, mn)))
    # A constraint that is a program's last step becomes its result's layout, which JAX forgets of
    # an array that is not committed to a device: the next program would take it for row-major.
    return jax.lax.optimization_barrier(sf)


def _scales(name: str, sf: Any, dtypes: tuple[Any, ...]) -> jax.Array:
    sf = jnp.asarray(sf)
    if sf.dtype not in dtypes:
        wanted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise TypeError(f"{name}: sf has dtype {sf.dtype}, wanted {wanted}")
    if sf.ndim not in (2, 3):
        raise ValueError(f"{name}: sf has shape {sf.shape}, wanted 2 or 3 dimensions")
    return sf
