"""The declarations of the indexer's ops."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.device import ARCHS
from .._core.op import Kernel, Op, Params
from . import reference
from .config import MAX_HEADS, TopkConfig, choose_logits

HEAD_DIMS = (32, 64, 128)
BLOCK_KV = (32, 64)
MAX_K = 2048
CHUNK_BYTES = 2**28  # of logits, at a time, that are only selected from

LOGITS_OPERANDS = {
    "q": "float8_e4m3fn[s h d]",
    "kv.data": "float8_e4m3fn[t d]",
    "kv.scale": "float32[t]",
    "weights": "float32[s h]",
    "cu_seq_len_k_start": "int32[s]",
    "cu_seq_len_k_end": "int32[s]",
}


@dataclasses.dataclass(frozen=True)
class LogitsParams(Params):
    columns: int = 0  # of the result
    compressed: bool = False  # whether a row's first column is its first key, and not key 0
    clean_logits: bool = True
    logits_dtype: Any = jnp.float32


@dataclasses.dataclass(frozen=True)
class TopkParams(Params):
    k: int = 0
    logits_dtype: Any = jnp.float32


def _check_head_dim(name, q):
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"{name}: q has d = {q.shape[-1]}, wanted 32, 64 or 128")


def _check_paged(params, operands):
    q, cache, *_ = operands
    name = "fp8_paged_mqa_logits"
    _check_head_dim(name, q)
    block_kv, width = cache.shape[1:]
    if block_kv not in BLOCK_KV:
        raise ValueError(f"{name}: fused_kv_cache has blocks of {block_kv}, wanted 32 or 64")
    if width != q.shape[-1] + 4:
        raise ValueError(
            f"{name}: fused_kv_cache has {width} bytes a key, wanted {q.shape[-1] + 4}: "
            f"d = {q.shape[-1]} of q, and 4 for the scale"
        )


def _divide_heads(total, params, *operands):
    """Each device's heads add to the same logits; the mask is in all parts, and stays: −∞."""
    (logits,) = total(dataclasses.replace(params, logits_dtype=jnp.float32), *operands)
    return [logits.astype(params.logits_dtype)]


def _logits_kernel(target):
    def attributes(params, operands, device):
        queries, heads = operands[0].shape[-3:-1]
        config = choose_logits(queries, heads, device)
        return {
            "config": np.array(dataclasses.astuple(config), np.int64),
            "arch": device.arch,
            "num_sms": np.int64(device.num_sms),
            "compressed": params.compressed,
            "clean": params.clean_logits,
        }

    def refuses(params, operands):
        return f"more than {MAX_HEADS} heads" if operands[0].shape[-2] > MAX_HEADS else None

    return Kernel(target=target, archs=ARCHS, attributes=attributes, refuses=refuses)


def _logits(name: str, derivative: str) -> Op:
    return Op(
        name,
        operands=LOGITS_OPERANDS,
        results={"logits": "logits_dtype[s columns]"},
        limits={"h": (1, 1)},
        check=lambda params, operands: _check_head_dim(name, operands[0]),
        reference=reference.fp8_mqa_logits,
        kernel=_logits_kernel("deepgemm_jax_mqa_logits"),
        derivative=derivative,
        batched=True,
        fold=("s",),
        # Starts and ends count from the first key, and the ReLU is of a whole product.
        whole=("t", "d"),
        divide=_divide_heads,
    )


fp8_mqa_logits = _logits(
    "fp8_mqa_logits", "its operands are quantised. mqa_logits takes them in float and has one"
)
# The same of operands in float, once they are quantised.
mqa_logits = _logits("mqa_logits", "mqa_logits can be differentiated once")

BACKWARD_OPERANDS = {
    "q": "float32|bfloat16|float16[s h d]",
    "kv": "float32|bfloat16|float16[t d]",
    "weights": "float32|bfloat16|float16[s h]",
    "cu_seq_len_k_start": "int32[s]",
    "cu_seq_len_k_end": "int32[s]",
    "gradient": "logits_dtype[s columns]",
}

# Two ops, since devices that share out the queries share the gradient of q, but have parts of a sum
# for that of kv.
mqa_logits_backward_q = Op(
    "mqa_logits_backward_q",
    operands=BACKWARD_OPERANDS,
    results={"q": "float32[s h d]", "weights": "float32[s h]"},
    reference=reference.mqa_logits_backward_q,
    derivative="mqa_logits can be differentiated once",
    batched=True,
    fold=("s",),
    whole=("t", "d", "columns"),
)

mqa_logits_backward_kv = Op(
    "mqa_logits_backward_kv",
    operands=BACKWARD_OPERANDS,
    results={"kv": "float32[t d]"},
    reference=reference.mqa_logits_backward_kv,
    derivative="mqa_logits can be differentiated once",
    batched=True,
    whole=("t", "d", "columns"),
    divide=lambda total, params, *operands: total(params, *operands),
)

fp8_paged_mqa_logits = Op(
    "fp8_paged_mqa_logits",
    operands={
        "q": "float8_e4m3fn[b n h d]",
        "fused_kv_cache": "uint8[blocks block_kv width]",
        "weights": "float32[b n h]",
        "context_lens": "int32[b n]",
        "block_table": "int32[b m]",
    },
    results={"logits": "logits_dtype[b n columns]"},
    limits={"n": (1, 1), "h": (1, 1), "blocks": (1, 1), "m": (1, 1)},
    check=_check_paged,
    reference=reference.fp8_paged_mqa_logits,
    kernel=_logits_kernel("deepgemm_jax_paged_mqa_logits"),
    derivative="its operands are quantised, and it is for decoding. mqa_logits has one",
    batched=True,
    fold=("b",),
    whole=("blocks", "block_kv", "width", "m", "d"),
    divide=_divide_heads,
)


def _topk_attributes(params, operands, device):
    config = TopkConfig(float32=int(params.logits_dtype == jnp.float32))
    return {"config": np.array(dataclasses.astuple(config), np.int64), "arch": device.arch}


indexer_topk = Op(
    "indexer_topk",
    operands={"logits": "float32|bfloat16[s t]"},
    results={"indices": "int32[s k]", "scores": "logits_dtype[s k]"},
    reference=reference.indexer_topk,
    kernel=Kernel(target="deepgemm_jax_topk", archs=ARCHS, attributes=_topk_attributes),
    derivative="indices have none. Stop the logits' gradient, and take scores that are to have one "
    "from the logits by jnp.take_along_axis",
    fold=("s",),
)


@reference.each_of_batch(q_dims=3)
def _logits_and_topk(params, q, kv, kv_scale, weights, start, end):
    """Of the other two ops, so that it has their kernels; a few queries' logits at a time."""
    keys = kv.shape[0]
    logits_params = LogitsParams(params.implementation, columns=keys)
    rows = CHUNK_BYTES // (4 * max(1, keys))

    def topk(q, weights, start, end):
        logits = fp8_mqa_logits(q, kv, kv_scale, weights, start, end, params=logits_params)
        return indexer_topk(logits, params=params)

    return list(reference.by_rows(topk, rows, (q, weights, start, end)))


indexer_topk_of_inputs = Op(
    "indexer_topk",
    operands=LOGITS_OPERANDS,
    results={"indices": "int32[s k]", "scores": "float32[s k]"},
    limits={"h": (1, 1)},
    check=lambda params, operands: _check_head_dim("indexer_topk", operands[0]),
    reference=_logits_and_topk,
    composed=True,
    derivative="its operands are quantised and indices have none. mqa_logits has one for logits",
    batched=True,
    fold=("s",),
)
