"""Quantisation to FP8 with the scales that the GEMMs take.

What all of these do alike:

- A scale is the largest magnitude in its block times the reciprocal of the FP8 dtype's largest
  number, but at least 2⁻¹²⁶; data are x times the scale's reciprocal, all in float32, rounded to
  the nearest, ties to even, and saturated.
- A block of zeros dequantises to zeros. Denormals of float32 count as zero.
- A block that holds a NaN or an infinity has a NaN for its scale and dequantises to NaN throughout;
  no other block is touched. In a product along the blocks nothing is lost: the row is NaN anyway.
- `dtype` is float8_e4m3fn or float8_e5m2.
- `scale_format` is "float32"; or "ue8m0": float32 rounded up to powers of two; or "packed_ue8m0":
  the exponents of these, four to an int32 along the last dim (see `ScaledArray`).
- Dims need not be multiples of 128: the last block is partial.
"""

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from .._core import compat, sums
from .._core.op import Op
from ..scaled import BLOCK, ScaledArray, pack_ue8m0
from . import config, op, reference

SCALE_FORMATS = ("float32", "ue8m0", "packed_ue8m0")


def per_token_cast_to_fp8(
    x: Any,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    r"""Quantises with one scale for each row and 128 columns, as `fp8_gemm_nt` wants A.

    $$s_{mg} = \max_{k \in \text{block } g} |x_{mk}| / \text{largest}, \qquad
    q_{mk} = \text{round}(x_{mk} / s_{mg})$$

    Args:
      x: bfloat16, float32 or float16 [M, K]; K is at least 1.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "float32", "ue8m0" or "packed_ue8m0".
      implementation: "xla" for plain JAX, "cuda" for a kernel, None for whichever there is.

    Returns:
      Data, `dtype` [M, K], and scale: float32 [M, ceil(K / 128)] or, packed,
      int32 [M, ceil(K / 512)]. In a jitted program the scale is written in the memory layout that
      the GEMM asks of it.

    Raises:
      TypeError: x is of another dtype.
      ValueError: x has no two dims; a dtype, format or implementation that there is not.
      NotImplementedError: `implementation="cuda"` where there is no kernel; a derivative is asked
        for.

    Under `jax.vmap` and on a mesh any dim may be divided, K where whole blocks fall to each device.

    Example:

        >>> import jax.numpy as jnp
        >>> x = per_token_cast_to_fp8(jnp.full((2, 300), -3.5, jnp.bfloat16))
        >>> x
        ScaledArray(float8_e4m3fn[2,300], scale=float32[2,3])
        >>> print(x.scale[0, 0], x.data[0, 0], x.dequantize()[0, 0])
        0.0078125 -448 -3.5
    """
    return _cast(op.per_token_cast_to_fp8, x, dtype, scale_format, implementation)


def per_channel_cast_to_fp8(
    x: Any,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    r"""Quantises with one scale for each column and 128 rows: for a product that contracts rows.

    $$s_{gk} = \max_{m \in \text{block } g} |x_{mk}| / \text{largest}$$

    Args:
      x: bfloat16, float32 or float16 [M, K]; K is at least 1.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "float32" or "ue8m0". Packed are only blocks along the last dim.
      implementation: "xla" for plain JAX, "cuda" for a kernel, None for whichever there is.

    Returns:
      Data, `dtype` [M, K], and scale, float32 [ceil(M / 128), K].

    Errors, `jax.vmap` and meshes: as `per_token_cast_to_fp8`, with M in the place of K.

    Example:

        >>> import jax.numpy as jnp
        >>> per_channel_cast_to_fp8(jnp.ones((300, 64)))
        ScaledArray(float8_e4m3fn[300,64], scale=float32[3,64])
    """
    _not_packed("per_channel_cast_to_fp8", scale_format)
    return _cast(op.per_channel_cast_to_fp8, x, dtype, scale_format, implementation)


def per_block_cast_to_fp8(
    x: Any,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    r"""Quantises with one scale for each block of 128 × 128, as `fp8_gemm_nt` wants B.

    $$s_{hg} = \max_{m \in \text{block } h, k \in \text{block } g} |x_{mk}| / \text{largest}$$

    Args:
      x: bfloat16, float32 or float16 [M, K]; K is at least 1.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "float32", "ue8m0" or "packed_ue8m0".
      implementation: "xla" for plain JAX, "cuda" for a kernel, None for whichever there is.

    Returns:
      Data, `dtype` [M, K], and scale: float32 [ceil(M / 128), ceil(K / 128)] or, packed,
      int32 [ceil(M / 128), ceil(K / 512)].

    Errors, `jax.vmap` and meshes: as `per_token_cast_to_fp8`; M and K are divided in whole blocks.

    Example:

        >>> import jax.numpy as jnp
        >>> per_block_cast_to_fp8(jnp.ones((300, 1024)), scale_format="packed_ue8m0")
        ScaledArray(float8_e4m3fn[300,1024], scale=int32[3,2])
    """
    return _cast(op.per_block_cast_to_fp8, x, dtype, scale_format, implementation)


def per_row_cast_to_fp8(
    x: Any,
    scale: Any = None,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    r"""Quantises with one scale for each row.

    $$s_m = \max_k |x_{mk}| / \text{largest}$$

    Args:
      x: bfloat16, float32 or float16 [M, K]; K is at least 1.
      scale: None, or float32 [M, 1], positive, to take instead: what it does not cover saturates,
        infinities too, and NaN stays NaN.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "float32" or "ue8m0", for the scale that is computed.
      implementation: "xla" for plain JAX, "cuda" for a kernel, None for whichever there is.

    Returns:
      Data, `dtype` [M, K], and scale, float32 [M, 1].

    Errors: as `per_token_cast_to_fp8`. Under `jax.vmap` and on a mesh any dim may be divided;
    within a `jax.shard_map` a row is what the device has of it.

    Example:

        >>> import jax.numpy as jnp
        >>> per_row_cast_to_fp8(jnp.ones((2, 300)))
        ScaledArray(float8_e4m3fn[2,300], scale=float32[2,1])
    """
    x = jnp.asarray(x)
    if scale is None and _has_whole_rows(x):
        _not_packed("per_row_cast_to_fp8", scale_format)
        row_cast = op.whole_rows_cast_to_fp8
        params = op.CastParams(implementation, *_formats(row_cast.name, dtype, scale_format))
        data, scale = row_cast(x, params=params)
        return ScaledArray(data, scale[:, None])
    return _cast_whole(op.per_row_cast_to_fp8, 1, x, scale, dtype, scale_format, implementation)


def per_tensor_cast_to_fp8(
    x: Any,
    scale: Any = None,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    r"""Quantises with one scale for all.

    $$s = \max_{mk} |x_{mk}| / \text{largest}$$

    Args:
      x: bfloat16, float32 or float16 [M, K]; K is at least 1.
      scale: None, or float32 [1, 1], positive, to take instead, such as one of earlier steps: what
        it does not cover saturates, infinities too, and NaN stays NaN.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "float32" or "ue8m0", for the scale that is computed.
      implementation: "xla" for plain JAX, "cuda" for a kernel, None for whichever there is.

    Returns:
      Data, `dtype` [M, K], and scale, float32 [1, 1].

    Errors: as `per_token_cast_to_fp8`. Under `jax.vmap` each element of the batch has a scale of
    its own; on a mesh any dim may be divided; within a `jax.shard_map` so has each device's part.

    Example:

        >>> import jax.numpy as jnp
        >>> x = per_tensor_cast_to_fp8(jnp.full((2, 3), 1e6), jnp.full((1, 1), 2.0))
        >>> print(x, x.dequantize()[0, 0])
        ScaledArray(float8_e4m3fn[2,3], scale=float32[1,1]) 896.0
    """
    return _cast_whole(
        op.per_tensor_cast_to_fp8, (0, 1), x, scale, dtype, scale_format, implementation
    )


@overload
def quantize_transpose(
    x: Any,
    group_sizes: None = None,
    *,
    dtype: Any = ...,
    scale_format: str = ...,
    implementation: str | None = ...,
) -> tuple[ScaledArray, ScaledArray]: ...


@overload
def quantize_transpose(
    x: Any,
    group_sizes: Any,
    *,
    dtype: Any = ...,
    scale_format: str = ...,
    implementation: str | None = ...,
) -> tuple[ScaledArray, ScaledArray, jax.Array]: ...


def quantize_transpose(
    x: Any,
    group_sizes: Any = None,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> tuple[Any, ...]:
    """Quantises x along its columns, and its transposed along theirs.

    The two operands that a layer's products need of one array: x itself, contracted over K, and xᵀ,
    contracted over M, for the gradient of the weight.

    With `group_sizes`, rows belong to groups, one after another, and no block of xᵀ holds rows of
    two: each group's columns begin at a multiple of 128, and zeros fill them up to the next. Rows
    of no group come back zero. Sizes below 0 count as 0, and no group reaches past M.

    Args:
      x: bfloat16, float32 or float16 [M, K]; K is at least 1.
      group_sizes: None, or integers [G]: on the device, and free to change without compiling again.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "float32", "ue8m0" or "packed_ue8m0".
      implementation: "xla" for plain JAX, "cuda" for a kernel, None for whichever there is.

    Returns:
      x as `per_token_cast_to_fp8` gives it: data [M, K]; xᵀ the same: data [K, P], where P is M or,
      with groups, 128 (M // 128 + G), which is enough for any sizes; and with groups, the number of
      columns that each group has in xᵀ, int32 [G], for the product that contracts them.

    Errors: as `per_token_cast_to_fp8`. Under `jax.vmap` it is one call. On a mesh M and K may be
    divided in whole blocks, with groups only K.

    Example:

        >>> import jax.numpy as jnp
        >>> x, xt, sizes = quantize_transpose(jnp.ones((300, 64)), jnp.array([130, 0, 5]))
        >>> print(x, xt, sizes)
        ScaledArray(float8_e4m3fn[300,64], scale=float32[300,1]) \
ScaledArray(float8_e4m3fn[64,640], scale=float32[64,5]) [256   0 128]
    """
    name = "quantize_transpose"
    x = jnp.asarray(x)
    params = op.CastParams(implementation, *_formats(name, dtype, scale_format))
    if group_sizes is None:
        results = op.quantize_transpose(x, params=params)
        return _scaled(results[:2], scale_format), _scaled(results[2:], scale_format)
    group_sizes = compat.whole(jnp.asarray(group_sizes))
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"{name}: group_sizes has dtype {group_sizes.dtype}, wanted integers")
    if x.ndim != 2 or group_sizes.ndim != 1 or not len(group_sizes):
        raise ValueError(
            f"{name}: group_sizes has shape {group_sizes.shape} for x of shape {x.shape}, "
            "wanted at least one group, in 1 dimension for 2"
        )
    m = x.shape[0]
    if group_sizes.dtype != jnp.int32:  # which is clamped where it is read
        group_sizes = sums.clamp(group_sizes, m)
    columns = BLOCK * (m // BLOCK + len(group_sizes))
    params = op.GroupedParams(**vars(params), columns=columns)
    results = op.quantize_transpose_grouped(x, group_sizes, params=params)
    _, sizes = reference.rows_of_groups(group_sizes, m)
    padded_sizes = reference.fill_up(sizes)
    return _scaled(results[:2], scale_format), _scaled(results[2:], scale_format), padded_sizes


def swiglu_quantize(
    x: Any,
    weights: Any = None,
    *,
    activation: str = "silu",
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    r"""Applies a gated activation and quantises the result per token, with no rounding between.

    $$y_{mh} = w_m\, f(x_{mh})\, x_{m,H+h}, \qquad
    s_{mg} = \max_{h \in \text{block } g} |y_{mh}| / \text{largest}$$

    Args:
      x: bfloat16, float32 or float16 [M, 2 H]: the gates, then what they gate.
      weights: None, or a float [M] that each row is multiplied by, as a router gives them.
      activation: f: "silu", "gelu" or "gelu_tanh", which is gelu's approximation.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "float32", "ue8m0" or "packed_ue8m0".
      implementation: "xla" for plain JAX, "cuda" for a kernel, None for whichever there is.

    Returns:
      Data, `dtype` [M, H], and scale: float32 [M, ceil(H / 128)] or, packed,
      int32 [M, ceil(H / 512)].

    Raises:
      TypeError: an operand is of another dtype.
      ValueError: shapes that do not fit; an activation, dtype, format or implementation that there
        is not.
      NotImplementedError: `implementation="cuda"` where there is no kernel; a derivative is asked
        for.

    Under `jax.vmap` a batch is more rows. On a mesh M may be divided.

    Example:

        >>> import jax.numpy as jnp
        >>> y = swiglu_quantize(jnp.ones((2, 512), jnp.bfloat16), jnp.array([1.0, 2.0]))
        >>> print(y, y.dequantize(jnp.bfloat16)[:, 0])
        ScaledArray(float8_e4m3fn[2,256], scale=float32[2,2]) [0.730469 1.46094]
    """
    return _activate(
        op.swiglu_quantize, x, weights, activation, dtype, scale_format, implementation
    )


def swiglu_quantize_backward(
    x: Any,
    dy: Any,
    weights: Any = None,
    *,
    activation: str = "silu",
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> tuple[ScaledArray, jax.Array | None]:
    r"""The gradient of a gated activation, quantised per token.

    $$dx_{mh} = w_m\, dy_{mh}\, x_{m,H+h}\, f'(x_{mh}), \qquad
    dx_{m,H+h} = w_m\, dy_{mh}\, f(x_{mh}), \qquad
    dw_m = \sum_h dy_{mh}\, f(x_{mh})\, x_{m,H+h}$$

    Args:
      x: bfloat16, float32 or float16 [M, 2 H]: what `swiglu_quantize` had.
      dy: the gradient of its result, of such a dtype, [M, H].
      weights: None, or a float [M], as there.
      activation, dtype, scale_format, implementation: as there.

    Returns:
      dx, quantised: data, `dtype` [M, 2 H], and scale: float32 [M, ceil(2 H / 128)] or, packed,
      int32 [M, ceil(2 H / 512)]; and dw, float32 [M], or None without weights.

    Errors, `jax.vmap` and meshes: as `swiglu_quantize`.

    Example:

        >>> import jax.numpy as jnp
        >>> dx, dw = swiglu_quantize_backward(jnp.ones((2, 512)), jnp.ones((2, 256)), jnp.ones(2))
        >>> print(dx, dw.round())
        ScaledArray(float8_e4m3fn[2,512], scale=float32[2,4]) [187. 187.]
    """
    return _activate_backward(
        op.swiglu_quantize_backward, x, dy, weights, activation, dtype, scale_format, implementation
    )


def activation_quantize(
    x: Any,
    weights: Any = None,
    *,
    activation: str = "silu",
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> ScaledArray:
    r"""Applies an activation that gates nothing and quantises the result per token.

    $$y_{mh} = w_m\, f(x_{mh}), \qquad
    s_{mg} = \max_{h \in \text{block } g} |y_{mh}| / \text{largest}$$

    Args:
      x: bfloat16, float32 or float16 [M, H].
      weights, activation, dtype, scale_format, implementation: as for `swiglu_quantize`.

    Returns:
      Data, `dtype` [M, H], and scale, as `swiglu_quantize` gives them.

    Errors and `jax.vmap`: as `swiglu_quantize`. On a mesh M may be divided, and H in whole blocks.

    Example:

        >>> import jax.numpy as jnp
        >>> y = activation_quantize(jnp.ones((2, 256), jnp.bfloat16), activation="gelu")
        >>> print(y, y.dequantize(jnp.bfloat16)[:, 0])
        ScaledArray(float8_e4m3fn[2,256], scale=float32[2,2]) [0.839844 0.839844]
    """
    return _activate(
        op.activation_quantize, x, weights, activation, dtype, scale_format, implementation
    )


def activation_quantize_backward(
    x: Any,
    dy: Any,
    weights: Any = None,
    *,
    activation: str = "silu",
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> tuple[ScaledArray, jax.Array | None]:
    r"""The gradient of an activation that gates nothing, quantised per token.

    $$dx_{mh} = w_m\, dy_{mh}\, f'(x_{mh}), \qquad dw_m = \sum_h dy_{mh}\, f(x_{mh})$$

    Args:
      x: bfloat16, float32 or float16 [M, H]: what `activation_quantize` had.
      dy: the gradient of its result, of such a dtype, [M, H].
      weights, activation, dtype, scale_format, implementation: as for `swiglu_quantize`.

    Returns:
      dx, quantised, [M, H] with its scale; and dw, float32 [M], or None without weights.

    Errors, `jax.vmap` and meshes: as `activation_quantize`.

    Example:

        >>> import jax.numpy as jnp
        >>> dx, dw = activation_quantize_backward(jnp.zeros((2, 256)), jnp.ones((2, 256)))
        >>> print(dx, dx.dequantize()[:, 0], dw)
        ScaledArray(float8_e4m3fn[2,256], scale=float32[2,2]) [0.5 0.5] None
    """
    return _activate_backward(
        op.activation_quantize_backward,
        x,
        dy,
        weights,
        activation,
        dtype,
        scale_format,
        implementation,
    )


@overload
def prepare_weight(
    w: Any,
    *,
    layout: str = ...,
    transposed: Literal[False] = ...,
    dtype: Any = ...,
    scale_format: str = ...,
    implementation: str | None = ...,
) -> ScaledArray: ...


@overload
def prepare_weight(
    w: Any,
    *,
    layout: str = ...,
    transposed: Literal[True],
    dtype: Any = ...,
    scale_format: str = ...,
    implementation: str | None = ...,
) -> tuple[ScaledArray, ScaledArray]: ...


def prepare_weight(
    w: Any,
    *,
    layout: str = "nk",
    transposed: bool = False,
    dtype: Any = jnp.float8_e4m3fn,
    scale_format: str = "float32",
    implementation: str | None = None,
) -> ScaledArray | tuple[ScaledArray, ScaledArray]:
    """Quantises weights, once, into the form that the GEMMs take: K last, by blocks of 128 × 128.

    Args:
      w: bfloat16, float32 or float16 [N, K] or [G, N, K], or with layout="kn" [K, N] or [G, K, N],
        where K is the dim that the forward product contracts.
      layout: the order of the last two dims, "nk" or "kn".
      transposed: whether the form for the input's gradient, which contracts N, is wanted too. It
        holds the same numbers.
      dtype: float8_e4m3fn or float8_e5m2.
      scale_format: "float32", "ue8m0" or "packed_ue8m0".
      implementation: "xla" for plain JAX, "cuda" for a kernel, None for whichever there is.

    Returns:
      Data, `dtype` [..., N, K], and scale: float32 [..., ceil(N / 128), ceil(K / 128)] or, packed,
      int32 [..., ceil(N / 128), ceil(K / 512)]. If `transposed`, a tuple of that and of the same
      with N and K interchanged.

    Errors, `jax.vmap` and meshes: as `per_block_cast_to_fp8`.

    Example:

        >>> import jax.numpy as jnp
        >>> w, wt = prepare_weight(jnp.ones((8, 256, 384)), layout="kn", transposed=True)
        >>> print(w, wt)
        ScaledArray(float8_e4m3fn[8,384,256], scale=float32[8,3,2]) \
ScaledArray(float8_e4m3fn[8,256,384], scale=float32[8,2,3])
    """
    name = "prepare_weight"
    if layout not in ("nk", "kn"):
        raise ValueError(f"{name}: layout is {layout!r}, wanted 'nk' or 'kn'")
    w = jnp.asarray(w)
    if w.ndim not in (2, 3):
        raise ValueError(f"{name}: w has shape {w.shape}, wanted 2 or 3 dimensions")
    params = op.CastParams(implementation, *_formats(name, dtype, scale_format))

    # What transposes as it casts has both forms anyway.
    both_ways = transposed or layout == "kn"
    cast = functools.partial(
        op.per_block_cast_both_ways if both_ways else op.per_block_cast_to_fp8, params=params
    )
    data, scale, *other = cast(w) if w.ndim == 2 else jax.vmap(cast)(w)
    given = _scaled((data, scale), scale_format)
    if not both_ways:
        return given
    other = _scaled(other, scale_format)
    weight, backward = (given, other) if layout == "nk" else (other, given)
    return (weight, backward) if transposed else weight


def _cast(op_: Op, x: Any, dtype: Any, scale_format: str, implementation: str | None):
    params = op.CastParams(implementation, *_formats(op_.name, dtype, scale_format))
    return _scaled(op_(jnp.asarray(x), params=params), scale_format)


def _has_whole_rows(x: jax.Array) -> bool:
    """Whether they are known to be undivided among devices, and few enough to be cast as a whole:
    then a kernel finds the scale too, and reads x once. Of Auto axes a type does not tell."""
    if x.ndim != 2 or x.shape[1] > config.WHOLE_ROW:
        return False
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = any(kind == AxisType.Auto and mesh.shape[name] > 1 for name, kind in axes)
    return not auto and all(axes is None for axes in sharding.spec[1:])


def _cast_whole(
    op_: Op,
    axis: int | tuple[int, ...],
    x: Any,
    scale: Any,
    dtype: Any,
    scale_format: str,
    implementation: str | None,
) -> ScaledArray:
    """With one scale along the axes, the scale computed here unless given."""
    x = jnp.asarray(x)
    _not_packed(op_.name, scale_format)
    params = op.CastParams(implementation, *_formats(op_.name, dtype, scale_format))
    if x.ndim != 2:
        raise ValueError(f"{op_.name}: x has shape {x.shape}, wanted 2 dimensions [m k]")
    wanted = (x.shape[0], 1) if axis == 1 else (1, 1)
    if scale is None:
        # No gradient is to reach the data by way of the scale: the op says that there is none.
        wide = reference.widen(jax.lax.stop_gradient(x))
        amax = reference.largest_magnitude(wide, axis, keepdims=True)
        scale = reference.scale_of(amax, params)
    scale = jnp.asarray(scale)
    if scale.shape != wanted:
        raise ValueError(f"{op_.name}: scale has shape {scale.shape}, wanted {wanted}")
    of_rows = jnp.broadcast_to(scale[:, 0], x.shape[:1])
    return ScaledArray(op_(x, of_rows, params=params), scale)


def _formats(name: str, dtype: Any, scale_format: str) -> tuple[Any, bool]:
    """The static parameters that say what is wanted."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        raise ValueError(f"{name}: dtype is {dtype}, wanted float8_e4m3fn or float8_e5m2")
    if scale_format not in SCALE_FORMATS:
        raise ValueError(
            f"{name}: scale_format is {scale_format!r}, wanted "
            + " or ".join(map(repr, SCALE_FORMATS))
        )
    return dtype, scale_format != "float32"


def _not_packed(name: str, scale_format: str) -> None:
    if scale_format == "packed_ue8m0":
        raise ValueError(
            f"{name}: scale_format is 'packed_ue8m0', which packs blocks of 128 along the last "
            "dim: wanted 'float32' or 'ue8m0'"
        )


def _activation_params(
    name: str, activation: str, dtype: Any, scale_format: str, implementation: str | None
) -> op.ActivationParams:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"{name}: activation is {activation!r}, wanted "
            + " or ".join(map(repr, reference.ACTIVATIONS))
        )
    formats = _formats(name, dtype, scale_format)
    return op.ActivationParams(implementation, *formats, activation=activation)


def _activate(
    op_: Op,
    x: Any,
    weights: Any,
    activation: str,
    dtype: Any,
    scale_format: str,
    implementation: str | None,
) -> ScaledArray:
    params = _activation_params(op_.name, activation, dtype, scale_format, implementation)
    operands = [jnp.asarray(operand) for operand in (x, weights) if operand is not None]
    return _scaled(op_(*operands, params=params), scale_format)


def _activate_backward(
    op_: Op,
    x: Any,
    dy: Any,
    weights: Any,
    activation: str,
    dtype: Any,
    scale_format: str,
    implementation: str | None,
) -> tuple[ScaledArray, jax.Array | None]:
    params = _activation_params(op_.name, activation, dtype, scale_format, implementation)
    operands = [jnp.asarray(operand) for operand in (x, dy, weights) if operand is not None]
    *dx, d_weights = op_(*operands, params=params)
    return _scaled(dx, scale_format), None if weights is None else d_weights.sum(axis=-1)


def _scaled(results: Any, scale_format: str) -> ScaledArray:
    data, scale = results
    return ScaledArray(data, pack_ue8m0(scale) if scale_format == "packed_ue8m0" else scale)
