"""The lightning indexer of DeepSeek sparse attention: logits of all keys, and the best of them."""

from typing import Any

import jax
import jax.numpy as jnp

from .._core import sums
from .._core.compat import vary_alike
from .._core.device import cuda_device
from ..scaled import ScaledArray, unpack
from . import gradient, op

Scaled = ScaledArray | tuple[Any, Any]


def fp8_mqa_logits(
    q: Any,
    kv: Scaled,
    weights: Any,
    cu_seq_len_k_start: Any,
    cu_seq_len_k_end: Any,
    *,
    clean_logits: bool = True,
    max_seqlen_k: int | None = None,
    logits_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    r"""Scores every query against every key that it may see, summed over the heads.

    $$\text{logits}_{ij} = s_j \sum_h w_{ih} \max(0, \sum_d q_{ihd} k_{jd})$$

    for keys j from `cu_seq_len_k_start[i]` to below `cu_seq_len_k_end[i]`, and −∞ for all others.
    The scale of q, of which there is one for a query's head, is to be part of the weights. A NaN in
    q, the keys or the weights makes the logits NaN that it is part of.

    Args:
      q: float8_e4m3fn [S, H, D]; D is 32, 64 or 128.
      kv: `ScaledArray` or tuple of data, float8_e4m3fn [T, D], and scale, float32 [T] (or [T, 1]).
      weights: float32 [S, H].
      cu_seq_len_k_start: int32 [S], each query's first key. Below 0 counts as 0.
      cu_seq_len_k_end: int32 [S], the end of its keys. Above T counts as T; a query that ends where
        it starts, or before, has none.
      clean_logits: False leaves the logits of keys that a query does not see unspecified.
      max_seqlen_k: the number of columns if rows are to be compressed: column j of row i is then
        key `cu_seq_len_k_start[i] + j`. Keys beyond are left out. None gives all T keys.
      logits_dtype: float32 or bfloat16.
      implementation: "cuda" for the kernel, "xla" for plain JAX, None for the kernel where there
        is one and plain JAX elsewhere.

    Returns:
      Logits, [S, T] or [S, max_seqlen_k], of `logits_dtype`.

    Raises:
      TypeError: kv is no scaled array, or an operand has another dtype.
      ValueError: shapes that do not fit each other or the limits above; a dtype or implementation
        that there is not.
      NotImplementedError: `implementation="cuda"` where there is no kernel, which is also so for
        more than 128 heads; a derivative is asked for. `mqa_logits` has one.

    Under `jax.vmap` a batch of queries with the same keys is one call with more of them, and any
    other one call with keys for each. On a mesh S, H and the batch may be divided among devices;
    dividing H costs a psum of float32 parts. T is not: within a `jax.shard_map` that divides it,
    call this with starts and ends less the first key's number.

    After `fp8_mqa_logits` of DeepGEMM, whose kernels take fewer shapes.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import fp8_mqa_logits
        >>> q = jnp.ones((3, 8, 32), jnp.float8_e4m3fn)
        >>> kv = jnp.ones((4, 32), jnp.float8_e4m3fn), jnp.full(4, 0.5)
        >>> start, end = jnp.array([0, 0, 2]), jnp.array([1, 4, 4])
        >>> print(fp8_mqa_logits(q, kv, jnp.ones((3, 8)), start, end))
        [[128. -inf -inf -inf]
         [128. 128. 128. 128.]
         [-inf -inf 128. 128.]]
    """
    name = "fp8_mqa_logits"
    data, scale = _unpack_keys(name, kv)
    params = _logits_params(
        name, data.shape, clean_logits, max_seqlen_k, logits_dtype, implementation
    )
    operands = map(jnp.asarray, (weights, cu_seq_len_k_start, cu_seq_len_k_end))
    return op.fp8_mqa_logits(jnp.asarray(q), data, scale, *operands, params=params)


def mqa_logits(
    q: Any,
    kv: Any,
    weights: Any,
    cu_seq_len_k_start: Any,
    cu_seq_len_k_end: Any,
    *,
    clean_logits: bool = True,
    max_seqlen_k: int | None = None,
    logits_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    r"""`fp8_mqa_logits` of operands in float, with a derivative: for the indexer's training.

    Forward, q is quantised to e4m3 with a scale for each query's head, which goes into its weight,
    and kv with a scale for each key; then it is `fp8_mqa_logits`. Backward is the gradient of

    $$\text{logits}_{ij} = \sum_h w_{ih} \max(0, \sum_d q_{ihd} k_{jd})$$

    at the float operands themselves: quantising counts as the identity, and the scores are computed
    anew in float32. So only float arrays are differentiated, q, kv and weights; no FP8 array is an
    operand or residual of it. Logits of keys that a query does not see have no part in it, nor has
    a cotangent given for them. Keys that no query sees, and queries that see no key, may hold
    anything, NaN too.

    Args:
      q: floating point [S, H, D]; D is 32, 64 or 128.
      kv: floating point [T, D].
      weights: floating point [S, H].
      cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k, logits_dtype,
        implementation: as of `fp8_mqa_logits`; "cuda" is said of the forward pass alone.

    Returns:
      Logits, [S, T] or [S, max_seqlen_k], of `logits_dtype`.

    Raises:
      TypeError: q, kv or weights are not floating point.
      ValueError, NotImplementedError: as `fp8_mqa_logits`.

    Reverse mode only, and once: there is no `jax.jvp`. On a mesh the backward pass is divided as
    the forward one; where S or H are, the gradient of kv is summed over the devices.

    Example:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import mqa_logits
        >>> q, kv, weights = jnp.ones((2, 8, 32)), jnp.ones((4, 32)), jnp.ones((2, 8))
        >>> start, end = jnp.array([0, 0]), jnp.array([1, 4])
        >>> def loss(weights):
        ...     return jax.nn.logsumexp(mqa_logits(q, kv, weights, start, end))
        >>> print(jax.grad(loss)(weights).sum(1).round())
        [ 51. 205.]
    """
    name = "mqa_logits"
    operands = tuple(map(jnp.asarray, (q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end)))
    for array, x in zip(("q", "kv", "weights"), operands, strict=False):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise TypeError(
                f"{name}: {array} has dtype {x.dtype}, wanted float32, bfloat16 or float16"
            )
    for array, x, dims in zip(("q", "kv", "weights"), operands, ("shd", "td", "sh"), strict=False):
        if x.ndim != len(dims):
            raise ValueError(
                f"{name}: {array} has shape {x.shape}, wanted {len(dims)} dimensions "
                f"[{' '.join(dims)}]"
            )
    params = _logits_params(
        name, operands[1].shape, clean_logits, max_seqlen_k, logits_dtype, implementation
    )
    # Before the rule and not in it, so that what is the same on all devices of a shard_map has its
    # gradient summed over them.
    return gradient.mqa_logits(params, *vary_alike(operands))


def fp8_paged_mqa_logits(
    q: Any,
    fused_kv_cache: Any,
    weights: Any,
    context_lens: Any,
    block_table: Any,
    schedule_meta: Any,
    max_context_len: int,
    *,
    clean_logits: bool = True,
    logits_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    r"""Scores each sequence's last queries against its keys in a cache of blocks.

    As `fp8_mqa_logits`, for B sequences of N queries each. Key j of sequence b is row
    `j % block_kv` of the cache's block `block_table[b, j // block_kv]`.

    Args:
      q: float8_e4m3fn [B, N, H, D]; D is 32, 64 or 128, N any number from 1 on.
      fused_kv_cache: uint8 [blocks, block_kv, 1, D + 4]; block_kv is 32 or 64. The bytes of a block
        are first its keys, float8_e4m3fn [block_kv, D], then their scales, float32 [block_kv]
        (little-endian); the shape tells their number alone.
      weights: float32 [B · N, H].
      context_lens: int32 [B], each sequence's number of keys, of which its last query sees all, the
        one before one less, and so on; or [B, N], the number for each query. 0 is allowed.
        Lengths above `max_context_len` or what the table has room for count as that.
      block_table: int32 [B, max_blocks]. Entries past a sequence's length are not followed, nor is
        anything outside the cache read.
      schedule_meta: what `get_paged_mqa_logits_metadata` gives, or None. Only DeepGEMM needs it:
        here each multiprocessor finds its share from the lengths themselves.
      max_context_len: the result's number of columns.
      clean_logits: False leaves the logits past a query's length unspecified; else they are −∞.
      logits_dtype: float32 or bfloat16.
      implementation: "cuda" for the kernel, "xla" for plain JAX, None for the kernel where there
        is one and plain JAX elsewhere.

    Returns:
      Logits, [B · N, max_context_len], of `logits_dtype`.

    Raises:
      TypeError: an operand has another dtype.
      ValueError: shapes that do not fit each other or the limits above; a dtype or implementation
        that there is not.
      NotImplementedError: `implementation="cuda"` where there is no kernel, which is also so for
        more than 128 heads; a derivative is asked for.

    Under `jax.vmap` a batch that shares one cache is one call with more sequences. On a mesh B, N,
    H and the batch may be divided among devices, the cache not.

    After `fp8_paged_mqa_logits` of DeepGEMM, which takes fewer N.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import fp8_paged_mqa_logits
        >>> keys = jnp.ones((3, 64, 32), jnp.float8_e4m3fn).view(jnp.uint8)
        >>> scales = jnp.full((3, 64), 0.5).view(jnp.uint8)
        >>> cache = jnp.concatenate([keys.reshape(3, -1), scales], 1).reshape(3, 64, 1, 36)
        >>> q = jnp.ones((2, 1, 8, 32), jnp.float8_e4m3fn)
        >>> table, lengths = jnp.array([[2, 0], [1, -1]]), jnp.array([66, 1])
        >>> logits = fp8_paged_mqa_logits(q, cache, jnp.ones((2, 8)), lengths, table, None, 128)
        >>> print(logits.shape, jnp.isfinite(logits).sum(1), logits[0, 65])
        (2, 128) [66  1] 128.0
    """
    name = "fp8_paged_mqa_logits"
    q, cache, weights, lengths, table = map(
        jnp.asarray, (q, fused_kv_cache, weights, context_lens, block_table)
    )
    if q.ndim != 4:
        raise ValueError(f"{name}: q has shape {q.shape}, wanted 4 dimensions [b n h d]")
    batch, next_n, heads, _ = q.shape
    if cache.ndim != 4 or cache.shape[2] != 1:
        raise ValueError(
            f"{name}: fused_kv_cache has shape {cache.shape}, wanted [blocks, block_kv, 1, d + 4]"
        )
    if weights.shape != (batch * next_n, heads):
        raise ValueError(
            f"{name}: weights has shape {weights.shape}, wanted {(batch * next_n, heads)}: "
            f"b = {batch} times n = {next_n} of q, and h = {heads}"
        )
    if lengths.ndim == 1 and lengths.shape == (batch,):
        # A negative one, which may be the least of integers, less something must not wrap around.
        later = jnp.arange(1 - next_n, 1, dtype=lengths.dtype)[None]
        lengths = jnp.maximum(lengths, 0)[:, None] + later
    if schedule_meta is not None:
        meta = jnp.asarray(schedule_meta)
        if meta.ndim != 2 or meta.shape[1] != 2 or meta.dtype != jnp.int32:
            raise ValueError(
                f"{name}: schedule_meta is {meta.dtype}{list(meta.shape)}, wanted None or what "
                "get_paged_mqa_logits_metadata gives, int32 [num_sms + 1, 2]"
            )
    if max_context_len < 1:
        raise ValueError(f"{name}: max_context_len is {max_context_len}, wanted at least 1")
    params = op.LogitsParams(
        implementation=implementation,
        columns=max_context_len,
        clean_logits=clean_logits,
        logits_dtype=_check_dtype(name, logits_dtype),
    )
    logits = op.fp8_paged_mqa_logits(
        q,
        cache[:, :, 0],
        weights.reshape(batch, next_n, heads),
        lengths,
        table,
        params=params,
    )
    return logits.reshape(batch * next_n, max_context_len)


def get_paged_mqa_logits_metadata(
    context_lens: Any, block_kv: int, num_sms: int | None = None
) -> jax.Array:
    """Divides the keys of all sequences among multiprocessors, for `fp8_paged_mqa_logits`.

    Each sequence is cut into splits of `4 * block_kv` keys, the last of which may be partial. Every
    multiprocessor takes as many of them as any other, or one fewer, one after the other.

    Args:
      context_lens: int32 [B] or [B, N], as for `fp8_paged_mqa_logits`; of N the largest counts.
      block_kv: 32 or 64.
      num_sms: how many multiprocessors; None for all that the device has.

    Returns:
      int32 [num_sms + 1, 2]: the sequence, and the split in it, at which each one's part starts,
      and last the end: B and 0. Computed on the device, from lengths as they are there.

    Raises:
      ValueError: another block_kv, no multiprocessor, lengths of other dims.
      TypeError: lengths that are not int32.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import get_paged_mqa_logits_metadata
        >>> lengths = jnp.array([600, 0, 200])  # 3 splits, none, 1
        >>> print(get_paged_mqa_logits_metadata(lengths, 64, num_sms=3))
        [[0 0]
         [0 2]
         [2 0]
         [3 0]]
    """
    name = "get_paged_mqa_logits_metadata"
    lengths = jnp.asarray(context_lens)
    if lengths.dtype != jnp.int32:
        raise TypeError(f"{name}: context_lens has dtype {lengths.dtype}, wanted int32")
    if lengths.ndim not in (1, 2) or 0 in lengths.shape[1:]:
        raise ValueError(f"{name}: context_lens has shape {lengths.shape}, wanted [b] or [b n]")
    if block_kv not in op.BLOCK_KV:
        raise ValueError(f"{name}: block_kv is {block_kv}, wanted 32 or 64")
    sms = cuda_device().num_sms if num_sms is None else num_sms
    if sms < 1:
        raise ValueError(f"{name}: num_sms is {sms}, wanted at least 1")
    longest = lengths if lengths.ndim == 1 else lengths.max(1)
    splits = -(-jnp.maximum(longest, 0) // (4 * block_kv))
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(splits, dtype=jnp.int32)])
    each, rest = ends[-1] // sms, ends[-1] % sms
    number = jnp.arange(sms + 1, dtype=jnp.int32)
    start = number * each + jnp.minimum(number, rest)
    # To the right of equal ends, past sequences that have no splits.
    sequence = sums.rank(ends[1:], start)
    return jnp.stack([sequence, start - ends[sequence]], 1)


def clean_logits(logits: Any, cu_seq_len_k_start: Any, cu_seq_len_k_end: Any) -> jax.Array:
    """Puts −∞ in place of the logits of keys that a query does not see.

    For logits that were computed with `clean_logits=False`. Plain JAX, which XLA fuses with what
    is around it; it has derivatives, and is divided on a mesh, like any such function.

    Args:
      logits: floating point [S, T].
      cu_seq_len_k_start, cu_seq_len_k_end: int32 [S], as for `fp8_mqa_logits`.

    Returns:
      [S, T] of the logits' dtype.

    Raises:
      TypeError: logits that are not floating point, starts or ends that are not int32.
      ValueError: shapes that do not fit.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import clean_logits
        >>> print(clean_logits(jnp.zeros((2, 3)), jnp.array([0, 1]), jnp.array([1, 9])))
        [[  0. -inf -inf]
         [-inf   0.   0.]]
    """
    name = "clean_logits"
    logits, start, end = map(jnp.asarray, (logits, cu_seq_len_k_start, cu_seq_len_k_end))
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"{name}: logits has dtype {logits.dtype}, wanted a floating one")
    if logits.ndim != 2:
        raise ValueError(f"{name}: logits has shape {logits.shape}, wanted 2 dimensions [s t]")
    for array, x in (("cu_seq_len_k_start", start), ("cu_seq_len_k_end", end)):
        if x.dtype != jnp.int32:
            raise TypeError(f"{name}: {array} has dtype {x.dtype}, wanted int32")
        if x.shape != logits.shape[:1]:
            raise ValueError(f"{name}: {array} has shape {x.shape}, wanted {logits.shape[:1]}")
    keys = jnp.arange(logits.shape[1])[None]
    inside = (keys >= start[:, None]) & (keys < end[:, None])
    return jnp.where(inside, logits, -jnp.inf)


def indexer_topk(
    logits: Any, k: int, *, return_scores: bool = False, implementation: str | None = None
) -> Any:
    """Each query's k best keys, from logits or from what they are computed of.

    Given the arguments of `fp8_mqa_logits` in place of its result, the logits of a few queries are
    computed at a time, so that [S, T] of them never exist.

    Args:
      logits: float32 or bfloat16 [S, T], −∞ where a query does not see a key; or the tuple
        `(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end)` that `fp8_mqa_logits` takes.
      k: 1 to 2048.
      return_scores: whether their logits are wanted too.
      implementation: "cuda" for the kernel, "xla" for plain JAX, None for the kernel where there
        is one and plain JAX elsewhere.

    Returns:
      Indices, int32 [S, k], the best first, of equals the one with the smaller index; 0 is more
      than −0, as in `jax.lax.top_k`, and NaN, of either sign, more than any number. A query that
      sees fewer than k keys has −1 for the rest. With `return_scores` a tuple of these and the
      scores, [S, k] of the logits' dtype (float32 given a tuple), −∞ where there is no key.

    Raises:
      TypeError: an operand has another dtype, or is no scaled array.
      ValueError: another k; shapes that do not fit.
      NotImplementedError: `implementation="cuda"` where there is no kernel; a derivative is asked
        for.

    Under `jax.vmap` a batch is more rows, but for a tuple with a batch of keys, which is one call
    for each. On a mesh S and the batch may be divided among devices.

    Example:

        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import indexer_topk
        >>> logits = jnp.array([[3.0, 1.0, 2.0], [-jnp.inf, 4.0, -jnp.inf]])
        >>> print(indexer_topk(logits, 2))
        [[ 0  2]
         [ 1 -1]]
    """
    name = "indexer_topk"
    if not 1 <= k <= op.MAX_K:
        raise ValueError(f"{name}: k is {k}, wanted 1 to {op.MAX_K}")
    if isinstance(logits, tuple):
        if len(logits) != 5:
            raise TypeError(f"{name}: got a tuple of {len(logits)}, wanted logits or 5 operands")
        q, kv, *rest = logits
        operands = [jnp.asarray(q), *_unpack_keys(name, kv), *map(jnp.asarray, rest)]
        params = op.TopkParams(implementation=implementation, k=k)
        indices, scores = op.indexer_topk_of_inputs(*operands, params=params)
    else:
        logits = jnp.asarray(logits)
        params = op.TopkParams(implementation=implementation, k=k, logits_dtype=logits.dtype)
        indices, scores = op.indexer_topk(logits, params=params)
    return (indices, scores) if return_scores else indices


def _unpack_keys(name: str, kv: Scaled) -> tuple[jax.Array, jax.Array]:
    data, scale = unpack(name, "kv", kv)
    # As ScaledArray has it, with as many dims as the data.
    if scale.ndim == 2 and scale.shape[1] == 1:
        scale = scale[:, 0]
    return data, scale


def _check_dtype(name: str, logits_dtype: Any) -> jnp.dtype:
    dtype = jnp.dtype(logits_dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{name}: logits_dtype is {dtype}, wanted float32 or bfloat16")
    return dtype


def _logits_params(
    name: str,
    kv_shape: tuple[int, ...],
    clean_logits: bool,
    max_seqlen_k: int | None,
    logits_dtype: Any,
    implementation: str | None,
) -> op.LogitsParams:
    if max_seqlen_k is not None and max_seqlen_k < 1:
        raise ValueError(f"{name}: max_seqlen_k is {max_seqlen_k}, wanted None or at least 1")
    keys = kv_shape[0] if kv_shape else 0  # of no dims: an error, which the op has the words for
    return op.LogitsParams(
        implementation=implementation,
        columns=keys if max_seqlen_k is None else max_seqlen_k,
        compressed=max_seqlen_k is not None,
        clean_logits=clean_logits,
        logits_dtype=_check_dtype(name, logits_dtype),
    )
