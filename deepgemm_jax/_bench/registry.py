"""Every op that is measured, and at which shapes."""

from __future__ import annotations

from . import attention, gemm, grouped, quantize
from .case import Benchmark

CONTIGUOUS = [  # groups, rows of each, n, k
    (4, 8192, 4096, 7168),
    (4, 8192, 7168, 2048),
    (4, 8192, 6144, 7168),
    (8, 4096, 4096, 7168),
    (8, 4096, 7168, 2048),
    (8, 4096, 4096, 4096),
    (8, 256, 4096, 7168),
    (64, 64, 4096, 7168),
    (256, 16, 4096, 7168),
]
MATRICES = [(32768, 7168), (8192, 4096), (4096, 2048)]  # rows, columns

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
            # Rows that no tile divides.
            (160, 7168, 2048),
            (1000, 7168, 2048),
            (4000, 4096, 7168),
        ],
    ),
    Benchmark(
        op="fp8_gemm_nt (1d1d, fp32 out, accumulate)",
        case=gemm.fp8_gemm_1d1d,
        chained=[],
        shapes=[(4096, 4096, 7168), (7168, 4096, 2048)],
    ),
    Benchmark(
        op="fp8_gemm_nt (rows)",
        compared_with="fp8_gemm_nt (1d2d)",
        case=gemm.fp8_gemm_rows,
        chained=[],
        shapes=[
            (4096, 4096, 4096),
            (8192, 8192, 4096),
            (16384, 4096, 4096),
            (4096, 24576, 1536),
            (4096, 7168, 16384),
            (4096, 4096, 7168),
        ],
    ),
    Benchmark(
        op="bf16_gemm_nt",
        case=gemm.bf16_gemm_nt,
        chained=[],
        shapes=[
            (4096, 4096, 4096),
            (8192, 8192, 4096),
            (16384, 4096, 4096),
            (64, 2112, 7168),
            (128, 7168, 2048),
            (4096, 4096, 7168),
        ],
    ),
    Benchmark(
        op="m_grouped_fp8_gemm_nt_contiguous",
        case=grouped.contiguous,
        chained=[],
        shapes=CONTIGUOUS,
    ),
    Benchmark(
        op="m_grouped_fp8_gemm_nt_contiguous (aligned)",
        compared_with="m_grouped_fp8_gemm_nt_contiguous",
        case=grouped.contiguous_aligned,
        chained=[],
        shapes=[shape for shape in CONTIGUOUS if shape[1] >= 256],
    ),
    Benchmark(
        op="m_grouped_fp8_gemm_nt_contiguous (skewed)",
        case=grouped.contiguous_skewed,
        chained=[],
        shapes=[(64, 128, 4096, 7168)],
    ),
    Benchmark(
        op="m_grouped_fp8_gemm_nt_contiguous (uniform)",
        case=grouped.contiguous,
        chained=[],
        shapes=[(64, 128, 4096, 7168)],
    ),
    Benchmark(
        op="m_grouped_bf16_gemm_nt_contiguous",
        case=grouped.bf16_contiguous,
        chained=[],
        shapes=[(4, 8192, 4096, 7168), (8, 4096, 7168, 2048)],
    ),
    Benchmark(
        op="ragged_dot",
        case=grouped.ragged_dot,
        chained=[],
        shapes=[
            (8, 4096, 4096, 7168),
            (8, 4096, 7168, 2048),
            (8, 256, 4096, 7168),
            (64, 64, 4096, 7168),
        ],
    ),
    Benchmark(
        op="m_grouped_fp8_gemm_nt_masked",
        case=grouped.masked,
        chained=[],
        shapes=[  # groups, rows of each at most, rows expected, n, k
            (8, 512, 256, 4096, 7168),
            (64, 512, 64, 4096, 7168),
            (256, 256, 16, 4096, 7168),
            (1, 4096, 1024, 4096, 7168),
            (1, 4096, 1024, 7168, 2048),
            (2, 4096, 512, 4096, 7168),
            (2, 4096, 512, 7168, 2048),
            (4, 4096, 256, 4096, 7168),
            (32, 4096, 192, 4096, 7168),
            (32, 4096, 192, 7168, 2048),
            (32, 4096, 20, 4096, 7168),
            (6, 4096, 20, 7168, 2048),
        ],
    ),
    Benchmark(
        op="k_grouped_fp8_gemm_nt_contiguous",
        case=grouped.k_grouped,
        chained=[],
        shapes=[(4, 4096, 7168, 8192)],  # groups, m, n, k of each
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
    Benchmark(
        op="indexer_topk",
        case=attention.indexer_topk,
        chained=[],
        shapes=[  # queries, keys, k, dtype of the logits
            (4096, 65536, 2048, "float32"),
            (4096, 65536, 2048, "bfloat16"),
        ],
    ),
    *(
        Benchmark(op=op, case=case, chained=[], shapes=MATRICES)
        for op, case in [
            ("per_token_cast_to_fp8", quantize.per_token_cast),
            ("per_channel_cast_to_fp8", quantize.per_channel_cast),
            ("per_block_cast_to_fp8", quantize.per_block_cast),
            ("per_row_cast_to_fp8", quantize.per_row_cast),
            ("per_tensor_cast_to_fp8 (given scale)", quantize.per_tensor_cast_by_given_scale),
            ("activation_quantize", quantize.activation_quantize),
            ("quantize_transpose", quantize.quantize_transpose),
        ]
    ),
    Benchmark(
        op="quantize_transpose (grouped)",
        case=quantize.quantize_transpose_grouped,
        chained=[],
        shapes=[(8, m, k) for m, k in MATRICES],  # groups, rows, columns
    ),
    *(
        Benchmark(op=op, case=case, chained=[], shapes=[(m, k // 2) for m, k in MATRICES])
        for op, case in [
            ("swiglu_quantize", quantize.swiglu_quantize),
            ("swiglu_quantize_backward", quantize.swiglu_quantize_backward),
        ]
    ),
    Benchmark(
        op="layout_transpose",
        case=quantize.layout_transpose,
        chained=[],
        shapes=[(size, m, n) for size in (1, 2, 4) for m, n in MATRICES],  # bytes, rows, columns
    ),
    Benchmark(
        op="mn_major_tma_aligned",
        case=quantize.mn_major,
        chained=[],
        shapes=[(1, 4096, 7168), (1, 8192, 7168)],  # groups, mn, k
    ),
]
