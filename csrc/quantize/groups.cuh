// Groups of rows whose transposed each begin at a multiple of 128 columns.
#pragma once

#include "device/numbers.cuh"
#include "quantize/config.h"

namespace deepgemm::quantize {

__forceinline__ int inclusive_sum(int x) {  // over a warp
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffff, x, step);
    if (threadIdx.x % 32 >= step) x += before;
  }
  return x;
}

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
      const int size_sum = inclusive_sum(size), t_sum = inclusive_sum(t_size);
      const int start = min(end + size_sum - size, m), length = min(size, m - start);
      // Right for the first group that m cuts off, too; those after it have no length.
      const int offset = t0 - (t_end + t_sum - t_size);
      const bool here = 0 <= offset && offset < length;
      m0 += __reduce_add_sync(0xffffffff, here ? start + offset : 0);
      rows += __reduce_add_sync(0xffffffff, here ? min(length - offset, kBlock) : 0);
      end = min(end + __shfl_sync(0xffffffff, size_sum, 31), m);
      t_end += __shfl_sync(0xffffffff, t_sum, 31);
    }
  }
};

}  // namespace deepgemm::quantize
