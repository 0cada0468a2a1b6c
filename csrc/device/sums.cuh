// Sums of no negative numbers over the threads before one. None grows beyond `most`, so that none
// overflows.
#pragma once

#include "device/ptx.cuh"

namespace deepgemm {

constexpr int kMost = 0x7fffffff;

__forceinline__ int sum_up_to(int most, int x, int y) {
  return min(static_cast<uint32_t>(x) + static_cast<uint32_t>(y), static_cast<uint32_t>(most));
}

// Of a lane's number and those of the lanes before it.
__forceinline__ int inclusive_sum(int x, int most = kMost) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffff, x, step);
    if (threadIdx.x % 32 >= step) x = sum_up_to(most, x, before);
  }
  return x;
}

// Of the numbers of a CTA's threads before this one, and of all; `sums` has room for each warp's.
template <int threads>
__forceinline__ int sum_before(int x, int* sums, int& total) {
  const int warp = threadIdx.x / 32;
  const int sum = inclusive_sum(x);
  if (threadIdx.x % 32 == 31) sums[warp] = sum;
  __syncthreads();
  int before = sum - x;
  total = 0;
#pragma unroll
  for (int i = 0; i < threads / 32; ++i) {
    if (i == warp) before += total;
    total += sums[i];
  }
  return before;
}

}  // namespace deepgemm
