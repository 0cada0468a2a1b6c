"""FP8 and BF16 matrix multiplication with block scales for JAX on NVIDIA GPUs."""

__version__ = "0.1.0"

from .attention import (
    clean_logits,
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    get_paged_mqa_logits_metadata,
    indexer_topk,
    mqa_logits,
)
from .gemm import fp8_gemm_nt
from .grouped import (
    k_grouped_bf16_gemm_nt_contiguous,
    k_grouped_bf16_gemm_tn_contiguous,
    k_grouped_fp8_gemm_nt_contiguous,
    k_grouped_fp8_gemm_tn_contiguous,
    m_grouped_bf16_gemm_nn_contiguous,
    m_grouped_bf16_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nt_masked,
    m_grouped_fp8_gemm_nn_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
    ragged_dot,
    ragged_dot_general,
)
from .runtime import cache_info, clear_cache, warmup, warmup_shapes
from .scaled import ScaledArray

__all__ = [
    "ScaledArray",
    "cache_info",
    "clean_logits",
    "clear_cache",
    "fp8_gemm_nt",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_paged_mqa_logits_metadata",
    "indexer_topk",
    "k_grouped_bf16_gemm_nt_contiguous",
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "mqa_logits",
    "ragged_dot",
    "ragged_dot_general",
    "warmup",
    "warmup_shapes",
]
