"""FP8 and BF16 matrix multiplication with block scales for JAX on NVIDIA GPUs."""

__version__ = "0.1.0"

from .gemm import fp8_gemm_nt
from .runtime import cache_info, clear_cache, warmup, warmup_shapes
from .scaled import ScaledArray

__all__ = [
    "ScaledArray",
    "cache_info",
    "clear_cache",
    "fp8_gemm_nt",
    "warmup",
    "warmup_shapes",
]
