"""Each form of the GEMM kernel on small integers, of which every sum is exact, whatever the order.

So results can be compared bit for bit, config by config.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from deepgemm_jax._core.device import cuda_device
from deepgemm_jax.gemm import op as dense
from deepgemm_jax.gemm.config import AnyConfig, Problem, candidates
from deepgemm_jax.grouped import op as grouped

M, N, K, GROUPS = 304, 320, 400, 5
SMS = 6  # few, that each has several tiles, and slices of some at last
BLOCKS_N, BLOCKS_K = -(-N // 128), -(-K // 128)
# Of groups, of rows or along K: one is of several tiles and blocks, and some are left over.
SIZES = np.array([33, 0, 1, 262, 4])
ENDS = np.cumsum(SIZES)


@dataclasses.dataclass(frozen=True)
class Form:
    """An op, random operands for it, and its result in float64, NaN where that is not defined."""

    name: str
    op: Any
    params: Any
    form: dense.Form
    operands: tuple[np.ndarray, ...]
    expected: np.ndarray

    def __str__(self) -> str:
        return self.name

    def arguments(self, dtype: Any, c: np.ndarray | None) -> tuple[Any, tuple[np.ndarray, ...]]:
        """The parameters and the operands of a call that adds C, if there is one."""
        params = dataclasses.replace(self.params, preferred_element_type=jnp.dtype(dtype))
        return params, self.operands if c is None else (*self.operands, c)

    def problem(self, dtype: Any, c: np.ndarray | None) -> Problem:
        return self.form.problem(*self.arguments(dtype, c))


def forms(seed: int = 0) -> Iterator[Form]:
    rng = np.random.default_rng(seed)

    def data(*shape, dtype=jnp.float8_e4m3fn):
        return rng.integers(-2, 3, shape).astype(dtype)

    def scale(*shape):
        return np.exp2(rng.integers(-1, 2, shape)).astype(np.float32)

    def wide(x, rows=1, k=K):
        """A scale for each element."""
        return np.repeat(np.repeat(np.asarray(x, np.float64), rows, -2), 128, -1)[..., :k]

    def double(x):
        return np.asarray(x, np.float64)

    def product(a, b):
        return a @ np.swapaxes(b, -1, -2)

    def by_blocks(name, *shape, k=K):
        *batch, m, n = shape
        a, b = data(*batch, m, k), data(*batch, n, k)
        blocks_n, blocks_k = -(-n // 128), -(-k // 128)
        a_scale, b_scale = scale(*batch, m, blocks_k), scale(*batch, blocks_n, blocks_k)
        b64 = double(b) * wide(b_scale, 128, k)[..., :n, :]
        return Form(
            name,
            dense.fp8_gemm_nt,
            dense.GemmParams(),
            dense.Form("blocks"),
            (a, a_scale, b, b_scale),
            product(double(a) * wide(a_scale, k=k), b64),
        )

    # Dense, FP8.
    for a_type, b_type in ((jnp.float8_e4m3fn,) * 2, (jnp.float8_e5m2, jnp.float8_e4m3fn)):
        a, b = data(M, K, dtype=a_type), data(N, K, dtype=b_type)
        a_scale = scale(M, BLOCKS_K)
        a64, b64 = double(a) * wide(a_scale), double(b)
        name = jnp.dtype(a_type).name
        blocks, channels = scale(BLOCKS_N, BLOCKS_K), scale(N, BLOCKS_K)
        rows, columns = scale(M), scale(N)
        for kind, which, scales, expected in (
            ("blocks", dense.fp8_gemm_nt, (a_scale, blocks), b64 * wide(blocks, 128)[:N]),
            ("channels", dense.fp8_gemm_nt_1d1d, (a_scale, channels), b64 * wide(channels)),
            ("rows", dense.fp8_gemm_nt_rows, (rows, columns), b64 * columns[:, None]),
        ):
            left = double(a) * rows[:, None] if kind == "rows" else a64
            yield Form(
                f"{kind} {name}",
                which,
                dense.GemmParams(),
                dense.Form(kind),
                (a, scales[0], b, scales[1]),
                product(left, expected),
            )
    # The same of few rows, which another kernel may compute.
    for *batch, m, n in ((1, N), (2, 17, N + 1), (128, N + 8)):
        yield by_blocks(f"{m} rows", *batch, m, n)
        a, b = (data(*batch, rows, K, dtype=jnp.bfloat16) for rows in (m, n))
        yield Form(
            f"{m} rows bf16",
            dense.bf16_gemm_nt,
            dense.GemmParams(),
            dense.Form("none"),
            (a, b),
            product(double(a), double(b)),
        )
    # Dense, bfloat16, in every layout.
    for layout in ("nt", "nn", "tn", "tt"):
        a, b = data(M, K, dtype=jnp.bfloat16), data(N, K, dtype=jnp.bfloat16)
        expected = product(double(a), double(b))
        form = dense.Form("none", a_mn_major=layout[0] == "t", b_mn_major=layout[1] == "n")
        operands = (a.T if form.a_mn_major else a, b.T if form.b_mn_major else b)
        which = getattr(dense, f"bf16_gemm_{layout}")
        yield Form(f"bf16 {layout}", which, dense.GemmParams(), form, operands, expected)
    # Rows of groups, in order, in none, and with padding behind each; NaN in what is no group's.
    weights = data(GROUPS, N, K)
    weight_scale = scale(GROUPS, BLOCKS_N, BLOCKS_K)
    channels, columns = scale(GROUPS, N, BLOCKS_K), scale(GROUPS, N)
    kinds = {
        "blocks": (weight_scale, double(weights) * wide(weight_scale, 128)[:, :N]),
        "channels": (channels, double(weights) * wide(channels)),
        "rows": (columns, double(weights) * columns[..., None]),
    }
    plain = data(GROUPS, N, K, dtype=jnp.bfloat16)
    first = 1  # row of a group
    starts, ends = (first + ENDS - SIZES).astype(np.int32), (first + ENDS).astype(np.int32)
    in_order = np.repeat([-1, *range(GROUPS), -1], [first, *SIZES, M - ends[-1]])
    shuffled = np.repeat(rng.integers(-1, GROUPS, M // 8), 8)
    padded = np.repeat(
        [-1, 1, -1, 1, -1, 4, 0, -1, 2, -1], [3, 20, 130, 1, 15, 73, 10, 12, 30, M - 294]
    )
    for order, ids in (
        ("sorted", in_order),
        ("in order", in_order),
        ("shuffled", shuffled),
        ("padded", padded),
    ):
        ids = ids.astype(np.int32)
        by_id = order != "in order"
        told = (ids,) if by_id else (starts, ends)
        member = (ids[:, None] == np.arange(GROUPS))[..., None]
        a, a_scale = data(M, K), scale(M, BLOCKS_K)
        a[ids < 0], a_scale[ids < 0] = np.nan, np.nan
        for kind in kinds if order in ("in order", "padded") else ["blocks"]:
            of_a = a_scale[:, 0] if kind == "rows" else a_scale
            a64 = double(a) * (of_a[:, None] if kind == "rows" else wide(of_a))
            each = product(a64, kinds[kind][1]).swapaxes(0, 1)
            which = grouped.m_grouped_fp8_gemm_nt_contiguous[kind]
            yield Form(
                f"contiguous {order}" + (f" {kind}" if kind != "blocks" else ""),
                which.by_id if by_id else which.in_order,
                grouped.GroupedParams(),
                dense.Form(kind, "contiguous", by_id=by_id),
                (a, of_a, weights, kinds[kind][0], *told),
                np.where(member, each, 0).sum(1),
            )
        a = data(M, K, dtype=jnp.bfloat16)
        a[ids < 0] = np.nan
        each = product(double(a), double(plain)).swapaxes(0, 1)
        for layout in ("nt", "nn"):
            which = getattr(grouped, f"m_grouped_bf16_gemm_{layout}_contiguous")
            yield Form(
                f"contiguous bf16 {layout} {order}",
                which.by_id if by_id else which.in_order,
                grouped.PlainParams(),
                dense.Form("none", "contiguous", b_mn_major=layout == "nn", by_id=by_id),
                (a, plain.swapaxes(1, 2) if layout == "nn" else plain, *told),
                np.where(member, each, 0).sum(1),
            )
    # The first rows of each group.
    rows = 140
    masked_m = np.array([0, rows, 1, 129, 64], np.int32)
    valid = (np.arange(rows) < masked_m[:, None])[..., None]
    a, a_scale = data(GROUPS, rows, K), scale(GROUPS, rows, BLOCKS_K)
    for kind, (of_b, weights64) in kinds.items():
        of_a = a_scale[..., 0] if kind == "rows" else a_scale
        a64 = double(a) * (of_a[..., None] if kind == "rows" else wide(of_a))
        yield Form(
            "masked" + (f" {kind}" if kind != "blocks" else ""),
            grouped.m_grouped_fp8_gemm_nt_masked[kind],
            grouped.MaskedParams(),
            dense.Form(kind, "masked"),
            (a, of_a, weights, of_b, masked_m),
            np.where(valid, product(a64, weights64), np.nan),
        )
    a = data(GROUPS, rows, K, dtype=jnp.bfloat16)
    yield Form(
        "masked bf16",
        grouped.m_grouped_bf16_gemm_nt_masked,
        grouped.MaskedParams(),
        dense.Form("none", "masked"),
        (a, plain, masked_m),
        np.where(valid, product(double(a), double(plain)), np.nan),
    )
    # Ranges of K.
    starts, ends = (ENDS - SIZES).astype(np.int32), ENDS.astype(np.int32)

    def sums(a, b):
        spans = zip(starts, ends, strict=True)
        return np.stack([product(a[:, i:j], b[:, i:j]) for i, j in spans])

    a, b = data(M, K), data(N, K)
    a_scale, b_scale = scale(M, BLOCKS_K), scale(N, BLOCKS_K)
    yield Form(
        "along K",
        grouped.k_grouped_fp8_gemm_nt_contiguous,
        grouped.GroupedParams(preferred_element_type=jnp.float32),
        dense.Form("channels", "along_k"),
        (a, a_scale, b, b_scale, starts, ends),
        sums(double(a) * wide(a_scale), double(b) * wide(b_scale)),
    )
    a, b = data(M, K, dtype=jnp.bfloat16), data(N, K, dtype=jnp.bfloat16)
    for layout in ("nt", "tn"):
        mn_major = layout == "tn"
        yield Form(
            f"along K bf16 {layout}",
            getattr(grouped, f"k_grouped_bf16_gemm_{layout}_contiguous"),
            grouped.PlainParams(preferred_element_type=jnp.float32),
            dense.Form("none", "along_k", a_mn_major=mn_major, b_mn_major=mn_major),
            (a.T, b.T, starts, ends) if layout == "tn" else (a, b, starts, ends),
            sums(double(a), double(b)),
        )
    # So many blocks of K that consumers without rows do not pass over a tile.
    yield by_blocks("long K", 200, 96, k=33 * 128)


FORMS = list(forms())


def run(form: Form, dtype: Any, c: np.ndarray | None = None, choose: Callable | None = None):
    """The op's result on a GPU if there is one; with configs from `choose` if it is given."""
    params, operands = form.arguments(dtype, c)
    batched = form.form.groups == "dense" and form.operands[0].ndim == 3
    with mock.patch.object(dense, "choose", choose or dense.choose):
        # A function of its own, lest JAX should take what another config was compiled to.
        def call(*x):
            return form.op(*x, params=params)

        return jax.jit(jax.vmap(call) if batched else call)(*operands)


def every_config(form: Form, dtype: Any, c: np.ndarray | None = None) -> Iterator[tuple[Any, Any]]:
    """Each config and the result that it gives on few multiprocessors."""
    for config, _ in candidates(form.problem(dtype, c), cuda_device()):
        with mock.patch.object(AnyConfig, "num_sms", lambda config, device: SMS):
            d = run(form, dtype, c, lambda problem, device, config=config: config)
        yield config, d


def assert_exact(form: Form, d: Any, c: np.ndarray | None = None) -> None:
    expected = form.expected if c is None else form.expected + np.asarray(c, np.float64)
    expected = np.asarray(expected.astype(np.float32).astype(d.dtype), np.float64)
    valid = ~np.isnan(expected)
    np.testing.assert_array_equal(np.asarray(d, np.float64)[valid], expected[valid])
