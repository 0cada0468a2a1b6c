"""The command line: ``python -m deepgemm_jax {info,demo,warmup,cache,bench}``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def shape(text: str) -> tuple:
    return tuple(int(size) if size.isdigit() else size for size in text.split(","))


def gemm_shape(text: str) -> tuple[int, int, int]:
    m, n, k = map(int, shape(text))
    return m, n, k


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deepgemm_jax")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("info", help="what is installed, what is missing and how to get it")
    commands.add_parser("demo", help="an FP8 MLP on this machine, against float32")

    warmup = commands.add_parser("warmup", help="compile kernels ahead of time")
    warmup.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        type=gemm_shape,
        metavar="M,N,K",
        help="what fp8_gemm_nt needs for this shape (repeatable); default: every kernel",
    )
    warmup.add_argument("--jobs", type=int, help="compilations at once; default: one a CPU core")

    cache = commands.add_parser("cache", help="the compiled kernels on disk")
    cache.add_argument("action", choices=["info", "clear"], nargs="?", default="info")

    bench = commands.add_parser("bench", help="measure every op on this GPU")
    bench.add_argument("--op", dest="ops", action="append", help="this op only (repeatable)")
    bench.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        type=shape,
        metavar="M,N,K",
        help="this shape (repeatable) in place of each op's own list",
    )
    bench.add_argument(
        "--flush-mb",
        type=int,
        default=8192,
        help="MiB written before each call to empty the L2 cache; default: %(default)s",
    )
    bench.add_argument(
        "--configs",
        action="store_true",
        help="time every config of a GEMM instead, and tell how good the choice among them is",
    )
    bench.add_argument(
        "--training",
        action="store_true",
        help="time a grouped MLP's forward and backward pass instead, and tell its memory",
    )
    bench.add_argument(
        "--quick",
        action="store_true",
        help="10 calls and a flush of 256 MB; writes nothing unless --out says where",
    )
    bench.add_argument(
        "--out", type=Path, help="folder for the results; default: benchmarks/results"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    match options.command:
        case "info":
            from ._cli import info

            info.run()
        case "demo":
            from ._cli import demo

            return demo.run()
        case "warmup":
            from ._cli import cache

            cache.warmup(options.shapes, options.jobs)
        case "cache":
            from ._cli import cache

            if options.action == "clear":
                cache.clear()
            else:
                cache.info()
        case "bench":
            from ._bench import configs, run, training

            what = configs if options.configs else training if options.training else run
            return what.main(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
