"""Random problems of the indexer, and what their logits must be. NumPy alone, in float64."""

import dataclasses

import numpy as np
from oracles import Oracle, difference, random_matrix

# By DeepGEMM's measure, of the logits that are not masked.
DIFFERENCE = {"float32": 5e-6, "bfloat16": 3e-5}


@dataclasses.dataclass(frozen=True)
class Problem:
    q: np.ndarray  # float8 [..., s, h, d]
    kv: tuple[np.ndarray, np.ndarray]  # float8 [..., t, d], float32 [..., t]
    weights: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @property
    def arguments(self):
        return self.q, self.kv, self.weights, self.start, self.end


def random_problem(seed: int, s: int, t: int, h: int = 8, d: int = 32, batch=()) -> Problem:
    """Starts and ends among which are some out of range, and some of queries that see nothing."""
    rng = np.random.default_rng(seed)
    rows = int(np.prod(batch, dtype=int))
    q = random_matrix(rng, rows * s * h, d, 1).data.reshape(*batch, s, h, d)
    kv = random_matrix(rng, rows * t, d, 1)
    start = rng.integers(-3, t // 2 + 2, (*batch, s))
    end = start + rng.integers(-1, t + 2, (*batch, s))
    return Problem(
        q,
        (kv.data.reshape(*batch, t, d), kv.scale.reshape(*batch, t)),
        rng.normal(size=(*batch, s, h)).astype(np.float32),
        start.astype(np.int32),
        end.astype(np.int32),
    )


def logits(problem: Problem, max_seqlen_k: int | None = None) -> Oracle:
    """By the definition; of a batch one after the other."""
    if problem.q.ndim > 3:
        each = [
            logits(Problem(q, (data, scale), *rest), max_seqlen_k)
            for q, data, scale, *rest in zip(
                problem.q, *problem.kv, problem.weights, problem.start, problem.end, strict=True
            )
        ]
        return Oracle(*(np.stack([getattr(o, f) for o in each]) for f in ("value", "magnitude")))
    q = np.asarray(problem.q, np.float64)
    data, scale = (np.asarray(x, np.float64) for x in problem.kv)
    weights = np.asarray(problem.weights, np.float64)[..., None]
    k = data * scale[:, None]
    value = (np.maximum(q @ k.T, 0) * weights).sum(1)
    magnitude = ((abs(q) @ abs(k).T) * abs(weights)).sum(1)
    columns = len(k) if max_seqlen_k is None else max_seqlen_k
    result = np.full((len(q), columns), -np.inf)
    sizes = np.zeros_like(result)
    for i, (start, end) in enumerate(zip(problem.start, problem.end, strict=True)):
        start, end = int(start), int(end)
        first = max(0, start)
        left = 0 if max_seqlen_k is None else first
        last = min(end, len(k), left + columns)
        if first < last:
            result[i, first - left : last - left] = value[i, first:last]
            sizes[i, first - left : last - left] = magnitude[i, first:last]
    return Oracle(result, sizes)


def assert_small_difference(x, oracle: Oracle) -> None:
    """DeepGEMM's measure, where the oracle is finite."""
    finite = np.isfinite(oracle.value)
    if (oracle.value[finite] != 0).any():
        found = np.asarray(x, np.float64)[finite]
        assert difference(found, oracle.value[finite]) < DIFFERENCE[str(x.dtype)]


def paged(rng, keys: list[tuple[np.ndarray, np.ndarray]], block_kv: int, max_blocks: int):
    """A cache of blocks in random order, with the keys of each sequence, and its table. Blocks that
    belong to no sequence hold NaN, and the table names no block past a sequence's end."""
    d = keys[0][0].shape[1]
    pages = [-(-len(data) // block_kv) for data, _ in keys]
    blocks = sum(pages) + 2
    cache = np.full((blocks, block_kv * (d + 4)), 0xFF, np.uint8)
    table = np.array([2**31 - 1, -1, blocks, -(2**31)], np.int32)
    table = rng.choice(table, (len(keys), max_blocks))
    free = list(rng.permutation(blocks))
    for sequence, (data, scale) in enumerate(keys):
        for page in range(pages[sequence]):
            part = np.s_[page * block_kv : (page + 1) * block_kv]
            block = table[sequence, page] = free.pop()
            values = data[part].view(np.uint8).ravel()
            scales = scale[part].view(np.uint8).ravel()
            cache[block, : len(values)] = values
            cache[block, block_kv * d : block_kv * d + len(scales)] = scales
    return cache.reshape(blocks, block_kv, 1, d + 4), table
