"""The indexer's kernels on the host: see tests/simulator."""

import ctypes
import mmap

import jax.numpy as jnp
import numpy as np

SMS = 2  # few, that each has several blocks and tiles
MARGIN = 64  # bytes


def fenced(shape, dtype) -> np.ndarray:
    """An array that other processes share, and behind which there is no memory."""
    size = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
    end = -(-(size + MARGIN) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + end), mmap.PAGESIZE, 0) == 0
    # A view of the margin in front, too.
    return np.frombuffer(memory, np.uint8)[end - size : end].view(dtype).reshape(shape)


def copied(x) -> np.ndarray:
    x = np.asarray(x)
    y = fenced(x.shape, x.dtype)
    y[...] = x
    return y


class LogitsOperands(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "keys", "scales", "weights", "start", "end", "pages", "logits")
        ),
        *(
            (name, ctypes.c_uint64)
            for name in ("sequences", "queries", "heads", "depth", "columns")
        ),
        *((name, ctypes.c_uint64) for name in ("keys_each", "caches", "cache_pages", "max_pages")),
        *((name, ctypes.c_bool) for name in ("out_float32", "compressed", "clean")),
    ]


def _simulate(library, queries, keys, scales, pages, dims, columns, dtype, **flags) -> np.ndarray:
    """The logits, as one row a query. `queries`: q, weights, start and end of each."""
    q, weights, start, end = (None if x is None else copied(x) for x in queries)
    keys, scales, pages = (None if x is None else copied(x) for x in (keys, scales, pages))
    *sequences, heads, depth = q.shape
    rows = int(np.prod(sequences))
    memory = fenced(MARGIN + rows * columns, dtype)
    memory[:] = 7
    logits = memory[MARGIN:].reshape(rows, columns)
    operands = LogitsOperands(
        *(x if x is None else x.ctypes.data for x in (q, keys, scales, weights, start, end, pages)),
        logits=logits.ctypes.data,
        sequences=rows // sequences[-1],
        queries=sequences[-1],
        heads=heads,
        depth=depth,
        columns=columns,
        out_float32=dtype == jnp.float32,
        **dims,
        **flags,
    )
    assert library.run(ctypes.byref(operands), SMS) == 0
    assert (memory[:MARGIN] == 7).all()
    return logits


def simulate_logits(library, problem, columns, dtype=jnp.float32, compressed=False, clean=True):
    """Of queries and keys one after the other; a batch has keys for each of its elements."""
    return _simulate(
        library,
        (problem.q, problem.weights, problem.start, problem.end),
        *problem.kv,
        None,
        {"keys_each": problem.kv[1].shape[-1]},
        columns,
        dtype,
        compressed=compressed,
        clean=clean,
    ).reshape(*problem.q.shape[:-2], columns)


def simulate_paged(library, q, cache, weights, lengths, table, columns, max_pages, clean=True):
    """`table` may end before its last row does. A batch in front of `cache` is shared out evenly
    among the sequences."""
    caches = cache.shape[0] if cache.ndim > 4 else 1
    dims = {
        "keys_each": cache.shape[-3],
        "caches": caches,
        "cache_pages": cache.shape[-4],
        "max_pages": max_pages,
    }
    return _simulate(
        library,
        (q, weights, None, lengths),
        cache,
        None,
        table,
        dims,
        columns,
        jnp.float32,
        clean=clean,
    )


class TopkParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "indices", "scores")),
        *((name, ctypes.c_int) for name in ("columns", "k")),
    ]


def simulate_topk(library, logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = logits.shape
    logits = copied(logits)
    indices, scores = fenced((rows, k), np.int32), fenced((rows, k), logits.dtype)
    params = TopkParams(*(x.ctypes.data for x in (logits, indices, scores)), columns, k)
    assert library.run(ctypes.byref(params), rows) == 0
    return indices, scores
