"""DeepGEMM and cuBLASLt on this GPU, for `python -m deepgemm_jax bench` to compare with.

    pip install torch==2.11.0 sgl-deep-gemm==0.1.4
    python benchmarks/deepgemm.py

measures the rows of bench that DeepGEMM has a counterpart for, and writes their times to
benchmarks/reference/<gpu>_deepgemm.json. The same kernel's time differs from card to card, so that
a comparison within a few percent needs both measured on one. nvcc has to be on the path.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import deep_gemm
import numpy as np
import torch
from deep_gemm.utils import per_block_cast_to_fp8, per_token_cast_to_fp8
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from deepgemm_jax._bench.attention import BLOCK_KV, paged_lengths
from deepgemm_jax._bench.grouped import padded_ids, sizes
from deepgemm_jax._bench.registry import BENCHMARKS
from deepgemm_jax._bench.results import Results, gpu_slug
from deepgemm_jax._bench.run import chosen
from deepgemm_jax._cli.info import driver_version
from deepgemm_jax.gemm.op import DEEPGEMM_ALIGNMENT

CALLS = 30
FLUSH_BYTES = 8 * 10**9
METHOD = (
    f"GPU kernel time alone (CUPTI), mean of {CALLS} calls after as many to warm up, each after a "
    f"write of {FLUSH_BYTES // 10**9} GB that flushes L2 and lets the chip rest; random normal "
    "data quantised to e4m3; group sizes int(expected * U(0.7, 1.3)) (random.seed(0)). "
    "deepgemm_us: its GEMM, logits or transposition kernel alone. cublaslt_us: as DeepGEMM calls "
    "cuBLASLt, for FP8 with one scale a tensor and without fast accumulation. clean_us: the kernel "
    "that fills masked logits."
)
WORKERS = 6  # threads that compile
FP8, BF16, INT32 = torch.float8_e4m3fn, torch.bfloat16, torch.int32


class Case(NamedTuple):
    """One op at one shape."""

    call: Callable[[], Any]
    note: str = ""
    cublaslt: Callable[[], Any] | None = None
    kernel: str = "sm90_"  # in the name of the kernel that counts


def normal(*shape):
    return torch.randn(*shape, dtype=BF16)


def rows(m, k):
    """Quantised with a scale for each 1 × 128."""
    return per_token_cast_to_fp8(normal(m, k), use_ue8m0=False)


def blocks(n, k):
    """Quantised with a scale for each 128 × 128."""
    return per_block_cast_to_fp8(normal(n, k), use_ue8m0=False)


def weights(groups, n, k):
    """Of more than 8 groups the contents repeat; their memory does not."""
    few = min(groups, 8)
    return [x.view(few, -1, x.shape[1]).repeat(groups // few, 1, 1) for x in blocks(few * n, k)]


# DeepGEMM's own default: N and K are compiled into dense kernels, too. The package's is none.
NK = {"compiled_dims": "nk"}


def fp8_gemm_nt(m, n, k):
    a, b, d = rows(m, k), blocks(n, k), torch.empty(m, n, dtype=BF16)
    return Case(
        functools.partial(deep_gemm.fp8_gemm_nt, a, b, d, **NK),
        cublaslt=functools.partial(deep_gemm.cublaslt_gemm_nt, a[0], b[0], d),
    )


def fp8_gemm_1d1d(m, n, k):
    a, b, d = rows(m, k), rows(n, k), torch.zeros(m, n)
    return Case(
        functools.partial(deep_gemm.fp8_gemm_nt, a, b, d, c=d, recipe=(1, 1, 128), **NK),
        cublaslt=functools.partial(deep_gemm.cublaslt_gemm_nt, a[0], b[0], d, c=d),
    )


def bf16_gemm_nt(m, n, k):
    a, b, d = normal(m, k), normal(n, k), torch.empty(m, n, dtype=BF16)
    return Case(
        functools.partial(deep_gemm.bf16_gemm_nt, a, b, d, **NK),
        cublaslt=functools.partial(deep_gemm.cublaslt_gemm_nt, a, b, d),
    )


def contiguous(op, a, b, groups, expected, n, k):
    """Groups that are filled up with rows of none, as DeepGEMM wants them."""
    counts = sizes(groups, expected)
    ids = padded_ids(counts, DEEPGEMM_ALIGNMENT)
    d = torch.empty(len(ids), n, dtype=BF16)
    return Case(
        functools.partial(op, a(len(ids), k), b(groups, n, k), d, torch.tensor(ids, dtype=INT32)),
        note=f"m={len(ids)} valid={counts.sum()} align={DEEPGEMM_ALIGNMENT}",
    )


def masked(groups, max_m, expected, n, k):
    counts = sizes(groups, expected)
    a = [x.view(groups, max_m, -1) for x in rows(groups * max_m, k)]
    d = torch.empty(groups, max_m, n, dtype=BF16)
    valid = torch.tensor(counts, dtype=INT32)
    op = deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked
    return Case(
        # As DeepGEMM's own tests hint at the rows of a group: somewhat more.
        functools.partial(op, a, weights(groups, n, k), d, valid, int(1.2 * expected)),
        note=f"valid={counts.sum()}",
    )


def k_grouped(groups, m, n, expected):
    """Each group's matrix has its own K contiguous; their scales have M or N so."""
    ks = sizes(groups, expected, DEEPGEMM_ALIGNMENT).tolist()

    def operand(mn):
        data, scale = rows(mn, sum(ks))
        matrices = [part.flatten() for part in data.split(ks, 1)]
        return torch.cat(matrices), scale.T.contiguous().T

    d = torch.zeros(groups, m, n)
    op = deep_gemm.k_grouped_fp8_gemm_nt_contiguous
    return Case(
        functools.partial(op, operand(m), operand(n), d, ks, torch.tensor(ks, dtype=INT32), c=d),
        note=f"ks={ks}",
    )


def mqa_logits(s, t, h, d, dtype):
    """Query i of s sees t − s + i of t keys."""
    keys, scale = rows(t, d)
    start, end = torch.zeros(s, dtype=INT32), torch.arange(t - s, t, dtype=INT32)
    return Case(
        functools.partial(
            deep_gemm.fp8_fp4_mqa_logits,
            (normal(s, h, d).to(FP8), None),
            (keys, scale.flatten()),
            torch.randn(s, h),
            start,
            end,
            clean_logits=dtype == "float32",
            logits_dtype=getattr(torch, dtype),
        )
    )


def paged_mqa_logits(b, n, h, d, context, dtype):
    """b sequences of n queries each, whose keys lie anywhere; as many as in our own case."""
    lengths = paged_lengths(np.random.default_rng(0), b, context)
    pages = -(-lengths // BLOCK_KV)
    count = int(pages.sum())
    free = torch.randperm(count, dtype=INT32).split(pages.tolist())
    cache = [x.view(count, -1).view(torch.uint8) for x in rows(count * BLOCK_KV, d)]
    seen = torch.tensor(lengths[:, None] + np.arange(1 - n, 1), dtype=INT32)
    return Case(
        functools.partial(
            deep_gemm.fp8_fp4_paged_mqa_logits,
            (normal(b, n, h, d).to(FP8), None),
            torch.cat(cache, 1).view(-1, BLOCK_KV, 1, d + 4),
            torch.randn(b * n, h),
            seen,
            torch.nn.utils.rnn.pad_sequence(free, batch_first=True),
            deep_gemm.get_paged_mqa_logits_metadata(seen, BLOCK_KV, deep_gemm.get_num_sms()),
            BLOCK_KV * int(pages.max()),
            logits_dtype=getattr(torch, dtype),
        )
    )


def mn_major(groups, mn, k):
    scale = torch.rand(groups, mn, k // 128)
    op = deep_gemm.utils.get_mn_major_tma_aligned_tensor
    return Case(functools.partial(op, scale), kernel="transpose_fp32")


CASES = {
    "fp8_gemm_nt (1d2d)": fp8_gemm_nt,
    "fp8_gemm_nt (1d1d, fp32 out, accumulate)": fp8_gemm_1d1d,
    "bf16_gemm_nt": bf16_gemm_nt,
    "m_grouped_fp8_gemm_nt_contiguous": functools.partial(
        contiguous, deep_gemm.m_grouped_fp8_gemm_nt_contiguous, rows, weights
    ),
    "m_grouped_bf16_gemm_nt_contiguous": functools.partial(
        contiguous, deep_gemm.m_grouped_bf16_gemm_nt_contiguous, normal, normal
    ),
    "m_grouped_fp8_gemm_nt_masked": masked,
    "k_grouped_fp8_gemm_nt_contiguous": k_grouped,
    "fp8_mqa_logits": mqa_logits,
    "fp8_paged_mqa_logits": paged_mqa_logits,
    "mn_major_tma_aligned": mn_major,
}


class Timer:
    """Microseconds that each kernel of a call takes, by its name."""

    def __init__(self):
        self._memory = torch.empty(FLUSH_BYTES // 4, dtype=INT32)
        self._flush = ()
        self._flush = tuple(self(lambda: None))

    def __call__(self, call):
        call()
        with torch.profiler.profile(
            activities=[ProfilerActivity.CUDA],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
            acc_events=True,
        ) as profiler:
            for _ in range(2):
                for _ in range(CALLS):
                    self._memory.zero_()
                    call()
                torch.cuda.synchronize()
                profiler.step()
        kernels = [
            event
            for event in profiler.key_averages()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        if lost := [f"{event.count} × {event.key}" for event in kernels if event.count % CALLS]:
            raise RuntimeError(f"kernels are missing from the profile of {CALLS} calls: {lost}")
        times = {event.key: event.self_device_time_total / CALLS for event in kernels}
        return {name: us for name, us in times.items() if name not in self._flush}


def measure(op, shape, timer):
    case = CASES[op](*shape)
    kernels = timer(case.call)

    def named(part):
        return [us for name, us in kernels.items() if part in name]

    if not named(case.kernel):
        raise RuntimeError(f"no kernel named {case.kernel} ran, but {list(kernels)}")
    row = {"op": op, "shape": list(shape), "deepgemm_us": sum(named(case.kernel))}
    if case.cublaslt is not None:
        row["cublaslt_us"] = sum(timer(case.cublaslt).values())
    clean = named("clean_logits")
    if note := f"clean_us={sum(clean):.1f}" if clean else case.note:
        row["note"] = note
    return row


def compared(ops):
    """The rows of bench that are compared with DeepGEMM's, once each."""
    rows = chosen(BENCHMARKS, ops, None)
    named = ((benchmark.compared_with or benchmark.op, shape) for benchmark, shape in rows)
    return list(dict.fromkeys(row for row in named if row[0] in CASES))


def compile_kernels(todo):
    """DeepGEMM has nvcc compile a kernel when it is first called for, into its cache on disk."""

    def call(op, shape):
        # What fails here fails again where it is measured, and is reported there.
        with contextlib.suppress(Exception):
            CASES[op](*shape).call()

    # The first is called alone: what DeepGEMM sets up but once may not be guarded against threads.
    call(*todo[0])
    with concurrent.futures.ThreadPoolExecutor(
        WORKERS, initializer=torch.set_default_device, initargs=["cuda"]
    ) as pool:
        for row in todo[1:]:
            pool.submit(call, *row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", dest="ops", action="append", help="this op only (repeatable)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/reference"), help="folder")
    options = parser.parse_args()
    todo = compared(options.ops)
    if not todo:
        parser.error(f"--op is one of {', '.join(CASES)}")
    torch.set_default_device("cuda")
    gpu = torch.cuda.get_device_name()
    about = {
        "gpu": gpu,
        "driver": driver_version(),
        "torch": torch.__version__,
        "deepgemm": f"sgl-deep-gemm {deep_gemm.__version__}",
        "date": datetime.date.today().isoformat(),
        "method": METHOD,
    }
    results = Results(options.out / f"{gpu_slug(gpu)}_deepgemm.json", about)
    compile_kernels(todo)
    timer = Timer()
    failures = 0
    for op, shape in todo:
        try:
            row = measure(op, shape, timer)
            results.add(row)
            times = {name: us for name, us in row.items() if name.endswith("_us")}
            print(op, shape, *(f"{name} {us:.2f}" for name, us in times.items()), flush=True)
        except Exception:
            # The next row may well succeed, and each costs time on a GPU.
            failures += 1
            print(f"{op} {shape} failed: {traceback.format_exc()}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
