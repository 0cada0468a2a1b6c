// spans[i] = the i-th run of rows of one group, for the id of each row's group; behind the last one
// a span that starts at m.
//
// One CTA. Each warp takes a stretch of rows and has all of their ids under way at once. It marks
// where runs start, learns how many start before its own, and writes them.
#pragma once

#include "device/ptx.cuh"
#include "gemm/config.h"

namespace deepgemm::gemm {

constexpr int kWarps = kRunsThreads / 32;
constexpr int kSteps = 16;  // of a warp through its stretch: a lane's marks are the bits of a word
constexpr int kStretch = 32 * kSteps;

extern "C" __global__ void __launch_bounds__(kRunsThreads)
    kernel(const int* ids, int m, int groups, Span* spans) {
  __shared__ int counts[kWarps];
  wait_for_previous_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto id_of = [&](int row) {
    const int id = __ldg(ids + row);
    return id >= 0 && id < groups ? id : -1;
  };

  int before = 0;
  for (int chunk = 0; chunk < m; chunk += kWarps * kStretch) {
    const int first = chunk + warp * kStretch;
    int id[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) id[i] = id_of(min(first + 32 * i + lane, m - 1));
    int last = first > 0 ? id_of(min(first, m) - 1) : -2;  // No group is -2.
    uint32_t starts = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      // Lane 0's predecessor is lane 31's of the step before.
      const int previous = __shfl_sync(0xffffffff, lane == 31 ? last : id[i], (lane + 31) % 32);
      starts |= uint32_t{id[i] != previous} << i;
      last = id[i];
    }
    const int count = __reduce_add_sync(0xffffffff, __popc(starts));
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    // The GEMM is there when the runs are; earlier, it would but wait.
    let_next_kernel_start();

    int run = before;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) run += counts[i];
      before += counts[i];
    }
    // At most steps there is none.
    for (uint32_t left = __reduce_or_sync(0xffffffff, starts); left; left &= left - 1) {
      const int i = __ffs(left) - 1;
      const uint32_t mask = __ballot_sync(0xffffffff, starts >> i & 1);
      if (mask >> lane & 1) {
        const int row = first + 32 * i + lane;
        const int mine = run + __popc(mask & (1u << lane) - 1);
        spans[mine].start = row;
        spans[mine].group = id_of(row);
        if (mine > 0) spans[mine - 1].end = row;
      }
      run += __popc(mask);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    spans[before].start = m;
    spans[before - 1].end = m;
  }
}

}  // namespace deepgemm::gemm
