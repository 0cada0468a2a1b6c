// PTX on numbers that has no CUDA C++ spelling without headers, a load for what is read once, and
// stores of what is read next. Names follow the PTX ISA; see its sections on max, cvt, ex2, ld, st.
#pragma once

#include "device/ptx.cuh"

namespace deepgemm {

__forceinline__ uint64_t policy_of_reads(long long bytes) {
  return l2_may_hold(bytes) ? kEvictFirst : kEvictNormal;
}

// 16 bytes for which there is no room in L1. Not by the path for constants (.nc): the kernel
// before, which wrote them, may have run at the same time as this one's beginning.
__forceinline__ uint4 load_once(const void* address, uint64_t policy) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address), "l"(policy));
  return x;
}

// Of results, which the next kernel reads. Everything else leaves L2 before them, so that memory is
// not kept busy by writing them at once.
__forceinline__ void store_result(void* address, uint2 x) {
  asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;" ::"l"(address), "r"(x.x),
               "r"(x.y), "l"(kEvictLast)
               : "memory");
}

__forceinline__ void store_result(void* address, uint4 x) {
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(address),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "l"(kEvictLast)
               : "memory");
}

__forceinline__ void store_result(float* address, float x) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(address), "f"(x), "l"(kEvictLast)
               : "memory");
}

__forceinline__ void store_result(unsigned short* address, unsigned short x) {
  asm volatile("st.global.L2::cache_hint.u16 [%0], %1, %2;" ::"l"(address), "h"(x), "l"(kEvictLast)
               : "memory");
}

// The larger magnitude, with some sign; NaN if either is.
__forceinline__ float larger(float x, float y) {
  float z;
  asm("max.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__forceinline__ uint32_t larger_bfloat16s(uint32_t x, uint32_t y) {  // of two at once
  uint32_t z;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// x y, where denormals and -0 count as 0: the addition makes that of them.
__forceinline__ float multiply_flushed(float x, float y) {
  float z;
  asm("fma.rn.ftz.f32 %0, %1, %2, 0f00000000;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to the nearest, as __frcp_rn has it, for numbers that are normal and whose reciprocals are:
// without the branch for others, which takes registers.
__forceinline__ float reciprocal_of_normal(float x) {
  const float y = reciprocal_approximate(x);
  return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
}

// To the nearest, ties to even, saturating; x is the lower byte.
template <bool e5m2>
__forceinline__ unsigned short to_fp8(float x, float y) {
  unsigned short bytes;
  if constexpr (e5m2) {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(y), "f"(x));
  } else {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(y), "f"(x));
  }
  return bytes;
}

// Of the two e4m3 in the low bytes. float16 has all numbers of e4m3.
__forceinline__ float2 from_e4m3(uint32_t bytes) {
  float2 x;
  asm("{\n"
      ".reg .b16 pair, low, high;\n"
      ".reg .b32 halves;\n"
      "cvt.u16.u32 pair, %2;\n"
      "cvt.rn.f16x2.e4m3x2 halves, pair;\n"
      "mov.b32 {low, high}, halves;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n"
      "}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(bytes));
  return x;
}

__forceinline__ uint32_t join(unsigned short low, unsigned short high) {
  uint32_t both;
  asm("mov.b32 %0, {%1, %2};" : "=r"(both) : "h"(low), "h"(high));
  return both;
}

}  // namespace deepgemm
