// Groups of rows whose transposed each begin at a multiple of 128 columns.
#pragma once

#include "device/sums.cuh"
#include "quantize/vector.cuh"

namespace deepgemm::quantize {

// Where the groups are, and which rows of x the tile has that begins at column t0 of the
// transposed. Each warp finds out for itself.
struct Groups {
  int end = 0, t_end = 0;  // of the groups looked at, in x and in the transposed
  int m0 = 0, rows = 0;

  __forceinline__ Groups(const int* sizes, int groups, int m, int t0) {
    const int lane = threadIdx.x % 32;
    for (int first = 0; first < groups; first += 32) {
      const int size = first + lane < groups ? min(max(sizes[first + lane], 0), m) : 0;
      const int t_size = ceil_div(size, kBlock) * kBlock;
      const int last = sum_up_to(m, end, inclusive_sum(size, m));
      const int t_last = sum_up_to(kMost, t_end, inclusive_sum(t_size));
      int start = __shfl_up_sync(0xffffffff, last, 1);
      if (lane == 0) start = end;
      const int length = last - start;
      // Right for the first group that m cuts off, too; those after it have no length.
      const int offset = t0 - (t_last - t_size);
      const bool here = 0 <= offset && offset < length;
      m0 += __reduce_add_sync(0xffffffff, here ? start + offset : 0);
      rows += __reduce_add_sync(0xffffffff, here ? min(length - offset, kBlock) : 0);
      end = __shfl_sync(0xffffffff, last, 31);
      t_end = __shfl_sync(0xffffffff, t_last, 31);
    }
  }
};

// Calls clear(batch, row) for rows of no group, shared out among as many CTAs as all rows have
// tiles.
template <class Clear>
__forceinline__ void clear_rows_of_none(int cta, const int* sizes, int groups, int m, Clear clear) {
  const int ctas = ceil_div(m, kBlock), batch = cta / ctas;
  const Groups all(sizes + batch * groups, groups, m, 0);
  for (int row = all.end + cta % ctas; row < m; row += ctas) clear(batch, row);
}

// A row of zeros in data[batch, m, k] and scale[batch, ceil(k / 128), m].
template <int threads>
__forceinline__ void clear_row(unsigned char* data, float* scale, float scale_of_zero, int m, int k,
                               int batch, int row) {
  uint2* vectors = reinterpret_cast<uint2*>(data + ((long long)batch * m + row) * k);
  for (int i = threadIdx.x; i < k / kVector; i += threads) vectors[i] = {};
  const int blocks = ceil_div(k, kBlock);
  for (int i = threadIdx.x; i < blocks; i += threads) {
    scale[((long long)batch * blocks + i) * m + row] = scale_of_zero;
  }
}

}  // namespace deepgemm::quantize
