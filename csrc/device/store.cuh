// Writes a warpgroup's accumulators (laid out as in wgmma.cuh) to a row-major matrix: as bfloat16
// into shared memory, and from there by the copy engine or, at an edge, by copy_rows; or straight
// from registers (store_row, add_row).
#pragma once

#include "device/ptx.cuh"

namespace deepgemm {

// Where 8 columns of one of a warp's 16 rows are staged, in boxes of `box` columns: swizzled as a
// tensor map with rows of 2 * box bytes expects them.
template <int box>
__forceinline__ uint32_t staged(uint32_t shared, int row, int chunk) {
  const uint32_t offset = row * box * 2 + chunk % (box / 8) * 16;
  const uint32_t swizzled = offset ^ (offset >> 7 & box / 8 - 1) << 4;
  return shared + chunk / (box / 8) * (16 * box * 2) + swizzled;
}

// A warp's 16 rows of accumulators as bfloat16.
template <int box, int count>
__forceinline__ void stage_rows(const float (&sum)[count], uint32_t shared, int lane) {
#pragma unroll
  for (int j = 0; j < count / 4; j += 2) {
    const float* x = &sum[4 * j];
    stmatrix(staged<box>(shared, lane % 16, j + lane / 16), pack_bfloat16(x[0], x[1]),
             pack_bfloat16(x[2], x[3]), pack_bfloat16(x[4], x[5]), pack_bfloat16(x[6], x[7]));
  }
}

// The first `rows` of the staged rows, `width` columns wide, to d and on, `columns` apart. There
// are none if either is negative.
template <int box>
__forceinline__ void copy_rows(uint32_t shared, unsigned short* d, int rows, int width, int columns,
                               int lane) {
  const int chunks = ceil_div(max(width, 0), 8);
  for (int i = lane; i < rows * chunks; i += 32) {
    const int row = i / chunks, chunk = i % chunks;
    const uint32_t from = staged<box>(shared, row, chunk);
    unsigned short* to = d + static_cast<long long>(row) * columns + chunk * 8;
    if (columns % 8 == 0) {
      *reinterpret_cast<uint4*>(to) = load_shared_quad(from);
    } else {
      const int count = min(8, width - chunk * 8);
      for (int j = 0; j < count; ++j) to[j] = load_shared_half(from + 2 * j);
    }
  }
}

// One row of a thread's accumulators to a row of D, or added to it; `half` 1 is the row eight below
// `half` 0.
template <bool accumulate, int count>
__forceinline__ void store_row(const float (&sum)[count], int half, float* d, int column,
                               int columns, int lane) {
  const bool pairs = columns % 2 == 0;  // rows are 8-byte aligned
#pragma unroll
  for (int i = half * 2; i < count; i += 4) {
    const int at = column + i / 4 * 8 + lane % 4 * 2;
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

// The same, added to a row of bfloat16.
template <int count>
__forceinline__ void add_row(const float (&sum)[count], int half, unsigned short* d, int column,
                             int columns, int lane) {
#pragma unroll
  for (int i = half * 2; i < count; i += 4) {
    const int at = column + i / 4 * 8 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (at + j >= columns) continue;
      d[at + j] = pack_bfloat16(bfloat16_to_float(d[at + j]) + sum[i + j], 0);
    }
  }
}

}  // namespace deepgemm
