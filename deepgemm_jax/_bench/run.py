"""Measures each row, prints it beside its references, and keeps it."""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

from .._progress import Progress
from ..runtime import Variant, compile_variants
from . import plot
from .case import PEAK_TFLOPS, Benchmark, Case, Program, peak_gbs
from .registry import BENCHMARKS
from .results import References, Results, Row, about, gpu_slug
from .timing import ENTRY_POINT, ColdTimer, Timer, mean_us, repeat, timeline

CHAIN = 100
# The result is rounded to bfloat16, which is 0.01 of a row's root mean square where it is largest.
WRONG = 0.05

# A reference's column tells how many times its time ours is faster.
COLUMNS: dict[str, tuple[int, Callable[[Row], str]]] = {
    "op": (20, lambda row: row["op"]),
    "shape": (18, lambda row: "×".join(map(str, row["shape"]))),
    "µs": (8, lambda row: f"{row['us']:.2f}"),
    "TFLOPS": (6, lambda row: f"{row['tflops']:.0f}"),
    "GB/s": (5, lambda row: f"{row['gbs']:.0f}"),
    "of floor": (8, lambda row: f"{row['floor_us'] / row['us']:.0%}"),
    "DeepGEMM": (8, lambda row: _faster(row, "deepgemm_us")),
    "cuBLASLt": (8, lambda row: _faster(row, "cublaslt_us")),
    "XLA": (6, lambda row: _faster(row, "xla_us")),
    "XLA bf16": (8, lambda row: _faster(row, "xla_bf16_us")),
    "XLA fp8": (8, lambda row: _faster(row, "xla_fp8_us")),
    "error": (8, lambda row: f"{row['error']:.1e}"),
}


class Session(NamedTuple):
    """What a run has, whatever it measures."""

    gpu: str
    timer: Timer
    folder: Path | None  # for results
    about: dict[str, Any]

    def file(self, kind: str) -> Path | None:
        return self.folder and self.folder / f"{gpu_slug(self.gpu)}{kind}"


def start(options: argparse.Namespace, fields: str) -> Session | None:
    """None, and a word to the user, if there is no GPU. `fields` tells what a row's fields mean."""
    try:
        gpu = jax.devices("cuda")[0].device_kind
    except RuntimeError:
        print("bench needs an NVIDIA GPU that JAX sees; `info` says what is missing here")
        return None
    calls, flush_mb = (10, 256) if options.quick else (30, options.flush_mb)
    method = (
        f"us: GPU time of the op's own kernels alone (CUPTI), mean of {calls} calls, each after a "
        f"write of {flush_mb} MiB that empties L2; random normal data quantised to e4m3. {fields}"
    )
    folder = options.out or (None if options.quick else Path("benchmarks/results"))
    return Session(gpu, ColdTimer(calls, flush_mb), folder, about(method))


def main(options: argparse.Namespace) -> int:
    session = start(options, _fields())
    if session is None:
        return 2
    results = Results(session.file(".json"), session.about)
    failures = measure_all(
        list(chosen(BENCHMARKS, options.ops, options.shapes)),
        session.timer,
        results,
        References(Path(f"benchmarks/reference/{gpu_slug(session.gpu)}_deepgemm.json")),
    )
    picture = session.file(".png")
    if picture is not None and results.rows:
        plot.draw(results.rows, session.gpu, picture)
        print(f"written to {session.folder}")
    return 1 if failures else 0


def _fields() -> str:
    peaks = ", ".join(f"{peak:.0f} TFLOPS in {kind}" for kind, peak in PEAK_TFLOPS.items())
    return (
        "total_us, with_quantize_us, xla_*_us: all kernels of the jitted op, of the op with A "
        "quantised in the same jit, and of XLA's own way, timed likewise. error: the largest in a "
        "row over the row's root mean square, against float64 on the dequantised operands, in a "
        "sample of rows; of what quantises or transposes the share of elements that are not XLA's. "
        f"chain_us: in one jit of {CHAIN} calls, a call's share of the time from "
        "the first kernel's start to the last one's end as the profiler tells it, chain_kernel_us "
        "its kernel's time there. compile_ms, cached_ms: one kernel in a fresh "
        "process, with an empty cache and a filled one (up to the cubin, not its loading into the "
        f"driver). floor_us: the larger of arithmetic at {peaks}, and bytes at {peak_gbs():.0f} "
        "GB/s."
    )


def chosen(
    benchmarks: Iterable[Benchmark],
    ops: Sequence[str] | None,
    shapes: Sequence[tuple[int, ...]] | None,
) -> Iterator[tuple[Benchmark, tuple]]:
    """The rows to measure. An op may be named by its function: "fp8_gemm_nt"."""
    for benchmark in benchmarks:
        if not ops or benchmark.op in ops or benchmark.op.split(" ")[0] in ops:
            for shape in shapes or benchmark.shapes:
                yield benchmark, shape


def measure_all(
    rows: Sequence[tuple[Benchmark, tuple]], timer: Timer, results: Results, references: References
) -> int:
    """Measures and prints the rows; returns how many of them failed."""
    failures = 0
    measured = []
    with Progress("bench", len(rows)) as progress, ThreadPoolExecutor(1) as compiler:
        progress.print(_line(list(COLUMNS)))
        for benchmark, shape in rows:
            try:
                row = measure(benchmark, shape, timer, compiler)
                row |= references.compare(row, benchmark.compared_with)
                results.add(row)
                measured.append((benchmark, shape, row))
                progress.print(_line([text(row) for _, text in COLUMNS.values()]))
            except Exception:
                # The next row may well succeed, and each costs time on a GPU.
                failures += 1
                progress.print(f"{benchmark.op} {shape} failed: {traceback.format_exc()}")
            progress.advance(f"{benchmark.op} {shape}")
    # Last of all: once JAX's own profiler has run in a process, CUPTI drops records of the timer's.
    for benchmark, shape, row in measured:
        if shape in benchmark.chained:
            results.add(row | measure_chain(benchmark.case(*shape)))
    print_summary(results.rows)
    return failures


def measure(benchmark: Benchmark, shape: tuple, timer: Timer, compiler: Executor) -> Row:
    case = benchmark.case(*shape)
    # In the background: the GPU's own clock does not notice.
    compiling = compiler.submit(compile_ms, case.variant)
    call = compiled(case.program)
    error = case.error(call())
    if not error < WRONG:
        raise RuntimeError(f"the result is wrong: its error is {error}")
    kernels = timer(call)
    us = mean_us(kernels, timer.calls, ENTRY_POINT)
    row = {
        "op": benchmark.op,
        "shape": list(shape),
        "us": us,
        "tflops": case.flops / us / 1e6,
        "gbs": case.bytes / us / 1e3,
        "floor_us": case.floor_us,
        "error": error,
        "total_us": mean_us(kernels, timer.calls),
    }
    for name, program in case.others.items():
        row[f"{name}_us"] = mean_us(timer(compiled(program)), timer.calls)
    row["compile_ms"], row["cached_ms"] = compiling.result()
    row["config"] = dict(case.config)
    return row


def measure_chain(case: Case) -> Row:
    """Of one of a chain's calls: its kernel's time, and its share of the time from the first
    kernel's start to the last one's end."""
    assert case.chain is not None
    call, repeats = compiled(case.chain(CHAIN)), 10
    jax.block_until_ready(call())
    events = timeline(lambda: repeat(call, repeats))
    own = [(name, end - start) for name, start, end in events if name == ENTRY_POINT]
    span = events[-1][2] - events[0][1]
    calls = repeats * CHAIN
    return {"chain_kernel_us": mean_us(own, calls), "chain_us": span / calls}


def compiled(program: Program) -> Callable[[], Any]:
    compiled = jax.jit(program.function).lower(*program.args).compile()
    return functools.partial(compiled, *program.args)


@functools.cache
def compile_ms(variant: Variant) -> tuple[float, float]:
    """Compiling this kernel, and finding it in the disk cache, each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        [cold], [cached] = (compile_variants([variant], directory=Path(folder)) for _ in range(2))
    assert cached.cached and not cold.cached
    return cold.seconds * 1e3, cached.seconds * 1e3


def print_summary(rows: Sequence[Row]) -> None:
    if not rows:
        return
    for row in rows:
        if "chain_us" in row:
            alone, there = (row["chain_us"] / row[field] for field in ("us", "chain_kernel_us"))
            print(
                f"{row['op']} {row['shape']}: in a chain of {CHAIN}, a call takes "
                f"{row['chain_us']:.2f} µs, {there:.3f} × its kernel there, {alone:.3f} × alone"
            )
    slowest, load = (max(row[field] for row in rows) for field in ("compile_ms", "cached_ms"))
    print(f"no kernel takes more than {slowest:.0f} ms to compile, {load:.1f} ms from the cache")
    for op in dict.fromkeys(row["op"] for row in rows):
        ratios = [row["ratio"] for row in rows if row["op"] == op and "ratio" in row]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            print(f"{op}: {mean:.3f} × DeepGEMM's speed, geometric mean of {len(ratios)} shapes")


def _line(cells: Sequence[str]) -> str:
    widths = [width for width, _ in COLUMNS.values()]
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _faster(row: Row, other: str) -> str:
    return f"{row[other] / row['us']:.2f}×" if other in row else "–"
