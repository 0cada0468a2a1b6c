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
      const int group_end = min(end + inclusive_sum(size), m);
      const int before = __shfl_up_sync(0xffffffff, group_end, 1);
      const int length = group_end - (lane ? before : end);
      const int t_length = ceil_div(length, kBlock) * kBlock;
      const int group_t_end = t_end + inclusive_sum(t_length);
      const int left = group_t_end - t0;  // of the group, from t0 on
      const bool here = 0 < left && left <= t_length;
      const int offset = t_length - left;
      m0 += __reduce_add_sync(0xffffffff, here ? group_end - length + offset : 0);
      rows += __reduce_add_sync(0xffffffff, here ? min(length - offset, kBlock) : 0);
      end = __shfl_sync(0xffffffff, group_end, 31);
      t_end = __shfl_sync(0xffffffff, group_t_end, 31);
    }
  }
};

}  // namespace deepgemm::quantize
