"""Every op that is measured, and at which shapes."""

from __future__ import annotations

from . import attention, gemm
from .case import Benchmark

BENCHMARKS = [
    Benchmark(
        op="fp8_gemm_nt (1d2d)",
        case=gemm.fp8_gemm_nt,
        chained=[(4096, 4096, 4096)],
        shapes=[  # m, n, k
            (4096, 4096, 4096),
            (8192, 8192, 4096),
            (16384, 4096, 4096),
            (1, 576, 7168),
            (1, 24576, 1536),
            (1, 32768, 512),
            (1, 7168, 16384),
            (1, 4096, 7168),
            (64, 2112, 7168),
            (64, 576, 7168),
            (64, 32768, 512),
            (64, 4096, 7168),
            (64, 7168, 2048),
            (128, 2112, 7168),
            (128, 24576, 1536),
            (128, 7168, 16384),
            (128, 7168, 2048),
            (4096, 576, 7168),
            (4096, 24576, 1536),
            (4096, 32768, 512),
            (4096, 7168, 16384),
            (4096, 4096, 7168),
        ],
    ),
    Benchmark(
        op="fp8_mqa_logits",
        case=attention.fp8_mqa_logits,
        chained=[],
        shapes=[  # queries, keys, heads, depth, dtype of the logits
            (2048, 4096, 64, 128, "float32"),
            (4096, 8192, 64, 128, "float32"),
            (4096, 8192, 64, 128, "bfloat16"),
            (4096, 65536, 64, 128, "float32"),
            (4096, 65536, 64, 128, "bfloat16"),
        ],
    ),
    Benchmark(
        op="fp8_paged_mqa_logits",
        case=attention.fp8_paged_mqa_logits,
        chained=[],
        shapes=[  # sequences, queries of each, heads, depth, keys of each, dtype of the logits
            (64, 1, 64, 128, 8192, "float32"),
            (64, 2, 64, 128, 8192, "float32"),
            (256, 1, 64, 128, 8192, "float32"),
        ],
    ),
]
