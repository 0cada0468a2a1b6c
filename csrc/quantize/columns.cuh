// Scales of the columns of tiles of 128 x 128, of each of which a thread of 16 x 16 has 8 rows
// of 8.
#pragma once

#include "quantize/vector.cuh"

namespace deepgemm::quantize {

constexpr int kRows = 8;                    // of a thread
constexpr int kWarps = 8;                   // of a CTA
constexpr int kVectors = kBlock / kVector;  // of a tile's row

// Of the thread's part of each of its columns.
template <class Input>
__forceinline__ Input largest_of_columns(const Input (&x)[kRows]) {
  Input largest = x[0];
#pragma unroll
  for (int i = 1; i < kRows; ++i) largest.take_larger(x[i]);
  return largest;
}

// Of all columns of `tiles` tiles that have the same rows.
template <class Input, int tiles>
struct ColumnScales {
  alignas(16) Input amax[kWarps][tiles * kVectors];  // of a warp's rows, each column's
  alignas(16) float reciprocal[tiles * kBlock];      // of a column's scale

  // Takes the thread's part of the columns of its vector in one of the tiles.
  __forceinline__ void give(int tile, Input largest) {
    largest.take_larger_of_lane(16);
    if (threadIdx.x % 32 < 16) {
      amax[threadIdx.x / 32][tile * kVectors + threadIdx.x % 16] = largest;
    }
  }

  // Once all threads have given: hands the scale of each column to store(column, scale).
  template <bool e5m2, class Store>
  __forceinline__ void find(int round_up, Store store) {
    __syncthreads();
#pragma unroll
    for (int first = 0; first < tiles * kBlock; first += kWarps * 32) {
      const int own = first + threadIdx.x;
      if (own >= tiles * kBlock) break;
      float of_all = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const auto* of_warp = reinterpret_cast<const typename Input::Element*>(amax[i]);
        of_all = larger(of_all, Input::number(of_warp[own]));
      }
      const float scale = scale_of<e5m2>(of_all, round_up);
      store(own, scale);
      reciprocal[own] = __frcp_rn(scale);
    }
    __syncthreads();
  }

  // What the thread divides its columns in one of the tiles by.
  __forceinline__ void read(int tile, float (&of_column)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(
          &reciprocal[tile * kBlock + threadIdx.x % 16 * kVector + j]);
      of_column[j] = four.x, of_column[j + 1] = four.y;
      of_column[j + 2] = four.z, of_column[j + 3] = four.w;
    }
  }
};

}  // namespace deepgemm::quantize
