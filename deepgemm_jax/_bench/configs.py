"""How good the choice of a config is: every likely candidate, at many shapes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
from collections.abc import Sequence

from .._progress import Progress
from ..gemm import explain, fp8_gemm_nt
from .case import Program
from .gemm import operands
from .results import Results, Row
from .run import compiled, start
from .timing import ENTRY_POINT, Timer, mean_us

SHAPES = 60
NEAR = 1.05  # times the best config's time
LIKELY = 1.5  # times the least predicted time: who is beyond that is not measured
FIELDS = (
    f"candidates: each config that is predicted to take at most {LIKELY} times as long as the one "
    "taken, which comes first, with its predicted and its measured time. "
    "over_best: the time of that one over the least."
)


def main(options: argparse.Namespace) -> int:
    session = start(options, FIELDS)
    if session is None:
        return 2
    results = Results(session.file("_configs.json"), session.about)
    measure_all(options.shapes or shapes(SHAPES), session.timer, results)
    return 0


def shapes(count: int) -> list[tuple[int, int, int]]:
    """Shapes such as models have: any number of tokens, and dims that are multiples of 64."""
    rng = random.Random(0)

    def size(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    return [(size(1, 16384), 64 * size(8, 384), 64 * size(8, 256)) for _ in range(count)]


def measure_all(shapes: Sequence[tuple[int, ...]], timer: Timer, results: Results) -> None:
    """Measures every likely candidate at each shape, and prints how the one taken compares."""
    with Progress("configs", len(shapes)) as progress:
        for shape in shapes:
            name = "×".join(map(str, shape))
            row = measure(*shape, timer=timer)
            results.add(row)
            taken = row["candidates"][0]
            progress.print(
                f"{name:>18}  {taken['us']:8.2f} µs, predicted {taken['predicted_us']:8.2f}, "
                f"{row['over_best']:.2f} × the best config's"
            )
            progress.advance(name)
    near = sum(row["over_best"] <= NEAR for row in results.rows)
    print(f"the config taken is within {NEAR - 1:.0%} of the best at {near}/{len(results.rows)}")


def measure(m: int, n: int, k: int, *, timer: Timer) -> Row:
    _, _, a, b = operands(m, n, k)
    [found] = explain(fp8_gemm_nt, a, b)
    timed = []
    for config, seconds in found.candidates:
        if seconds > LIKELY * found.candidates[0][1]:
            break
        call = compiled(Program(functools.partial(fp8_gemm_nt, config=config), (a, b)))
        us = mean_us(timer(call), timer.calls, ENTRY_POINT)
        timed.append(dataclasses.asdict(config) | {"predicted_us": seconds * 1e6, "us": us})
    best = min(candidate["us"] for candidate in timed)
    return {
        "op": "fp8_gemm_nt (1d2d)",
        "shape": [m, n, k],
        "over_best": timed[0]["us"] / best,
        "candidates": timed,
    }
