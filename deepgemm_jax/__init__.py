"""FP8 and BF16 matrix multiplication with block scales for JAX on NVIDIA GPUs."""

__version__ = "0.1.0"

from .gemm import fp8_gemm_nt
from .scaled import ScaledArray

__all__ = ["ScaledArray", "fp8_gemm_nt"]
