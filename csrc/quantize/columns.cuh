// Scales of a tile's 128 columns, of which each thread of 16 x 16 has 8 rows of 8.
#pragma once

#include "quantize/vector.cuh"

namespace deepgemm::quantize {

constexpr int kRows = 8;   // of a thread
constexpr int kWarps = 8;  // of a CTA

struct ColumnScales {
  alignas(16) float amax[kWarps][kBlock];  // of a warp's rows, each column's
  alignas(16) float reciprocal[kBlock];    // of a column's scale
};

// Of the thread's part of each of its columns.
template <class Input>
__forceinline__ Input largest_of_columns(const Input (&x)[kRows]) {
  Input largest = x[0];
#pragma unroll
  for (int i = 1; i < kRows; ++i) largest.take_larger(x[i]);
  return largest;
}

// Writes the scales of the tile's columns, `count` of which there are, and leaves in `of_column`
// what the thread divides its own by, which begin at `column`.
template <bool e5m2, class Input>
__forceinline__ void scale_columns(ColumnScales& shared, const Input (&x)[kRows], int column,
                                   float* scale, int count, int round_up,
                                   float (&of_column)[kVector]) {
  const Input largest = largest_of_columns(x);
  float amax[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    amax[j] = larger(largest[j], __shfl_xor_sync(0xffffffff, largest[j], 16));
  }
  if (threadIdx.x % 32 < 16) {
    float4* out = reinterpret_cast<float4*>(&shared.amax[threadIdx.x / 32][column]);
    out[0] = {amax[0], amax[1], amax[2], amax[3]};
    out[1] = {amax[4], amax[5], amax[6], amax[7]};
  }
  __syncthreads();
  if (const int own = threadIdx.x; own < kBlock) {
    float of_all = shared.amax[0][own];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) of_all = larger(of_all, shared.amax[i][own]);
    const float of_own = scale_of<e5m2>(of_all, round_up);
    if (own < count) scale[own] = of_own;
    shared.reciprocal[own] = __frcp_rn(of_own);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kVector; j += 4) {
    const float4 four = *reinterpret_cast<const float4*>(&shared.reciprocal[column + j]);
    of_column[j] = four.x, of_column[j + 1] = four.y;
    of_column[j + 2] = four.z, of_column[j + 3] = four.w;
  }
}

}  // namespace deepgemm::quantize
