// spans[i] = the i-th run of rows of one group, for the id of each row's group, and spans[m - i]
// the i-th run of rows of none. Behind the last ones, between the two, a span that starts at m.
//
// One CTA. Each warp takes a stretch of rows and has all of their ids under way at once. It marks
// where runs start, learns how many start before its own, and writes them.
#pragma once

#include "device/ptx.cuh"
#include "gemm/config.h"

namespace deepgemm::gemm {

constexpr int kWarps = kRunsThreads / 32;
constexpr int kSteps = 32;  // of a warp through its stretch: a lane's marks are the bits of a word
constexpr int kStretch = 32 * kSteps;

extern "C" __global__ void __launch_bounds__(kRunsThreads)
    kernel(const int* ids, int m, int groups, Span* spans) {
  __shared__ int2 counts[kWarps];  // of runs that start in its stretch: of groups, of none
  wait_for_previous_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto id_of = [&](int row) {
    const int id = __ldg(ids + row);
    return id >= 0 && id < groups ? id : -1;
  };

  int2 before = {0, 0};
  for (int chunk = 0; chunk < m; chunk += kWarps * kStretch) {
    const int first = chunk + warp * kStretch;
    int id[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) id[i] = id_of(min(first + 32 * i + lane, m - 1));
    int last = first > 0 ? id_of(min(first, m) - 1) : -2;  // No group is -2.
    uint32_t starts = 0, none = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      // Lane 0's predecessor is lane 31's of the step before.
      const int previous = __shfl_sync(0xffffffff, lane == 31 ? last : id[i], (lane + 31) % 32);
      starts |= uint32_t{id[i] != previous} << i;
      none |= uint32_t{id[i] < 0} << i;
      last = id[i];
    }
    const int of_none = __reduce_add_sync(0xffffffff, __popc(starts & none));
    const int all = __reduce_add_sync(0xffffffff, __popc(starts));
    if (lane == 0) counts[warp] = make_int2(all - of_none, of_none);
    __syncthreads();
    // The GEMM is there when the runs are; earlier, it would but wait.
    let_next_kernel_start();

    int2 run = before;
    for (int i = 0; i < kWarps; ++i) {
      const int2 x = counts[i];
      if (i < warp) run = make_int2(run.x + x.x, run.y + x.y);
      before = make_int2(before.x + x.x, before.y + x.y);
    }
    // At most steps there is none.
    for (uint32_t left = __reduce_or_sync(0xffffffff, starts); left; left &= left - 1) {
      const int i = __ffs(left) - 1;
      const uint32_t mask = __ballot_sync(0xffffffff, starts >> i & 1);
      const uint32_t mask_none = mask & __ballot_sync(0xffffffff, none >> i & 1);
      if (mask >> lane & 1) {
        const int row = first + 32 * i + lane, id = id_of(row);
        const uint32_t earlier = (1u << lane) - 1;
        const int x = run.x + __popc(mask & ~mask_none & earlier);
        const int y = run.y + __popc(mask_none & earlier);
        Span& span = spans[id < 0 ? m - y : x];
        span.start = row;
        span.group = id;
        if (row > 0) spans[id_of(row - 1) < 0 ? m - (y - 1) : x - 1].end = row;
      }
      run.x += __popc(mask & ~mask_none);
      run.y += __popc(mask_none);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    spans[before.x].start = spans[m - before.y].start = m;
    spans[id_of(m - 1) < 0 ? m - (before.y - 1) : before.x - 1].end = m;
  }
}

}  // namespace deepgemm::gemm
