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
static_assert(kWarps == 32);  // a lane for each
// Of a warp through its stretch, at most: a lane's marks are the bits of a word.
constexpr int kSteps = 32;

// Runs of groups and runs of none; of one chunk they fit a word.
struct Count {
  int of_groups = 0, of_none = 0;

  __forceinline__ Count operator+(uint32_t packed) const {
    return {of_groups + int(packed >> 16), of_none + int(packed & 0xffff)};
  }
};

__forceinline__ uint32_t count(uint32_t starts, uint32_t none) {
  return __popc(starts & ~none) << 16 | __popc(starts & none);
}

extern "C" __global__ void __launch_bounds__(kRunsThreads)
    kernel(const int* ids, int m, int groups, Span* spans) {
  __shared__ uint32_t counts[kWarps];  // of runs that start in its stretch
  wait_for_previous_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto id_of = [&](int row) {
    const int id = __ldg(ids + row);
    return id >= 0 && id < groups ? id : -1;
  };
  // Behind so many: the next run of the id's kind, or with `back` of 1 the last one.
  const auto span_of = [&](int id, Count before, int back = 0) -> Span& {
    return spans[id < 0 ? m - (before.of_none - back) : before.of_groups - back];
  };

  Count before;
  for (int chunk = 0; chunk < m; chunk += kRunsThreads * kSteps) {
    // All warps have a share of a short chunk.
    const int steps = min(kSteps, ceil_div(m - chunk, kRunsThreads));
    const int first = chunk + warp * 32 * steps;
    int id[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i < steps) id[i] = id_of(min(first + 32 * i + lane, m - 1));
    }
    int last = first > 0 ? id_of(min(first, m) - 1) : -2;  // No group is -2.
    uint32_t starts = 0, none = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i == steps) break;
      // Lane 0's predecessor is lane 31's of the step before.
      const int previous = __shfl_sync(0xffffffff, lane == 31 ? last : id[i], (lane + 31) % 32);
      starts |= uint32_t{id[i] != previous} << i;
      none |= uint32_t{id[i] < 0} << i;
      last = id[i];
    }
    const uint32_t own = __reduce_add_sync(0xffffffff, count(starts, none));
    if (lane == 0) counts[warp] = own;
    __syncthreads();
    // The GEMM is there when the runs are; earlier, it would but wait.
    let_next_kernel_start();

    const uint32_t of_warp = counts[lane];
    Count run = before + __reduce_add_sync(0xffffffff, lane < warp ? of_warp : 0);
    before = before + __reduce_add_sync(0xffffffff, of_warp);
    // At most steps there is none.
    for (uint32_t left = __reduce_or_sync(0xffffffff, starts); left; left &= left - 1) {
      const int i = __ffs(left) - 1;
      const uint32_t starting = __ballot_sync(0xffffffff, starts >> i & 1);
      const uint32_t of_none = __ballot_sync(0xffffffff, none >> i & 1);
      if (starting >> lane & 1) {
        const int row = first + 32 * i + lane, id = id_of(row);
        const Count here = run + count(starting & (1u << lane) - 1, of_none);
        Span& span = span_of(id, here);
        span.start = row;
        span.group = id;
        if (row > 0) span_of(id_of(row - 1), here, 1).end = row;
      }
      run = run + count(starting, of_none);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    spans[before.of_groups].start = spans[m - before.of_none].start = m;
    span_of(id_of(m - 1), before, 1).end = m;
  }
}

}  // namespace deepgemm::gemm
