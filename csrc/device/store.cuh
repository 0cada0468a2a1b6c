// Writes a warpgroup's accumulators (laid out as in wgmma.cuh) to a row-major matrix: as bfloat16
// into shared memory for the copy engine (stage_rows), or straight from registers to global memory,
// with any edge (store_row).
#pragma once

#include "device/ptx.cuh"

namespace deepgemm {

__forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__forceinline__ float bfloat16_to_float(unsigned short bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__forceinline__ void add(float* d, float x, float y) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(d), "f"(x), "f"(y)
               : "memory");
}

__forceinline__ void add(float* d, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(d), "f"(x) : "memory");
}

// Stores four 8 x 8 matrices of 16-bit elements; each lane gives the address of one row.
__forceinline__ void stmatrix(uint32_t shared, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(x0), "r"(x1), "r"(x2), "r"(x3)
               : "memory");
}

// A warp's 16 rows of accumulators as bfloat16 into boxes of 16 rows x `box` columns, swizzled as a
// tensor map with rows of 2 * box bytes expects them.
template <int box, int count>
__forceinline__ void stage_rows(const float (&sum)[count], uint32_t shared) {
  const int lane = threadIdx.x % 32;
  const int row = lane % 16;
#pragma unroll
  for (int j = 0; j < count / 4; j += 2) {
    const int chunk = j + lane / 16;  // eight columns, 16 bytes
    const uint32_t offset = row * box * 2 + chunk % (box / 8) * 16;
    const uint32_t swizzled = offset ^ (offset >> 7 & box / 8 - 1) << 4;
    const float* x = &sum[4 * j];
    stmatrix(shared + chunk / (box / 8) * (16 * box * 2) + swizzled, pack_bfloat16(x[0], x[1]),
             pack_bfloat16(x[2], x[3]), pack_bfloat16(x[4], x[5]), pack_bfloat16(x[6], x[7]));
  }
}

// Lane q of four holds row q of a 4 x 4 matrix and gets column q.
__forceinline__ void transpose_quad(uint32_t (&x)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffff, upper ? x[i] : x[i + step], step);
      if (upper) {
        x[i] = received;
      } else {
        x[i + step] = received;
      }
    }
  }
}

// One row of a thread's accumulators; `half` 1 is the row eight below `half` 0.
template <bool accumulate, int count>
__forceinline__ void store_row(const float (&sum)[count], int half, float* d, bool valid,
                               int column, int columns) {
  if (!valid) return;
  const bool pairs = columns % 2 == 0;  // rows are 8-byte aligned
#pragma unroll
  for (int i = half * 2; i < count; i += 4) {
    const int at = column + i / 4 * 8 + threadIdx.x % 4 * 2;
    if (pairs && at < columns) {
      if constexpr (accumulate) {
        add(d + at, sum[i], sum[i + 1]);
      } else {
        *reinterpret_cast<float2*>(d + at) = make_float2(sum[i], sum[i + 1]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (at + j >= columns) continue;
        if constexpr (accumulate) {
          add(d + at + j, sum[i + j]);
        } else {
          d[at + j] = sum[i + j];
        }
      }
    }
  }
}

template <bool accumulate, int count>
__forceinline__ void store_row(const float (&sum)[count], int half, unsigned short* d, bool valid,
                               int column, int columns) {
  constexpr int chunks = count / 4;
  const int q = threadIdx.x % 4;
  uint32_t packed[chunks];
#pragma unroll
  for (int j = 0; j < chunks; ++j) {
    float x = sum[4 * j + 2 * half], y = sum[4 * j + 2 * half + 1];
    if constexpr (accumulate) {
      const int at = column + 8 * j + 2 * q;
      if (valid && at < columns) x += bfloat16_to_float(d[at]);
      if (valid && at + 1 < columns) y += bfloat16_to_float(d[at + 1]);
    }
    packed[j] = pack_bfloat16(x, y);
  }
  if (columns % 8 != 0) {  // rows are not 16-byte aligned
#pragma unroll
    for (int j = 0; j < chunks; ++j) {
      const int at = column + 8 * j + 2 * q;
      if (valid && at < columns) d[at] = packed[j];
      if (valid && at + 1 < columns) d[at + 1] = packed[j] >> 16;
    }
    return;
  }
#pragma unroll
  for (int j = 0; j + 4 <= chunks; j += 4) {  // 32 columns: 16 bytes a thread
    uint32_t x[4] = {packed[j], packed[j + 1], packed[j + 2], packed[j + 3]};
    transpose_quad(x);
    const int at = column + 8 * (j + q);
    if (valid && at < columns)
      *reinterpret_cast<uint4*>(d + at) = make_uint4(x[0], x[1], x[2], x[3]);
  }
#pragma unroll
  for (int j = chunks / 4 * 4; j < chunks; ++j) {
    const int at = column + 8 * j + 2 * q;
    if (valid && at < columns) *reinterpret_cast<uint32_t*>(d + at) = packed[j];
  }
}

}  // namespace deepgemm
