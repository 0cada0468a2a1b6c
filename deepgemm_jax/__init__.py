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
from .layout import (
    get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mk_alignment_for_contiguous_layout,
    get_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mn_major_tma_aligned_tensor,
    get_tma_aligned_size,
    layout_transpose,
    transform_sf_into_required_layout,
)
from .quantize import (
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_row_cast_to_fp8,
    per_tensor_cast_to_fp8,
    per_token_cast_to_fp8,
    prepare_weight,
    quantize_transpose,
    swiglu_quantize,
    swiglu_quantize_backward,
)
from .runtime import cache_info, clear_cache, warmup, warmup_shapes
from .scaled import ScaledArray
from .training import Recipe, fp8_dot, grouped_linear, grouped_mlp

__all__ = [
    "Recipe",
    "ScaledArray",
    "cache_info",
    "clean_logits",
    "clear_cache",
    "fp8_dot",
    "fp8_gemm_nt",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "get_paged_mqa_logits_metadata",
    "get_tma_aligned_size",
    "grouped_linear",
    "grouped_mlp",
    "indexer_topk",
    "k_grouped_bf16_gemm_nt_contiguous",
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "layout_transpose",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "mqa_logits",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_row_cast_to_fp8",
    "per_tensor_cast_to_fp8",
    "per_token_cast_to_fp8",
    "prepare_weight",
    "quantize_transpose",
    "ragged_dot",
    "ragged_dot_general",
    "swiglu_quantize",
    "swiglu_quantize_backward",
    "transform_sf_into_required_layout",
    "warmup",
    "warmup_shapes",
]
