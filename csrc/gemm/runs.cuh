// spans[i] = the i-th run of rows of one group, for the id of each row's group; behind the last one
// a span that starts at m.
//
// One CTA. Each warp takes a stretch of rows: it counts the runs that start there, learns how many
// start before, and goes over its rows once more to write them.
#pragma once

#include "device/ptx.cuh"
#include "gemm/config.h"

namespace deepgemm::gemm {

constexpr int kWarps = kRunsThreads / 32;

// Calls `visit(row, id, mask)` for rows of the stretch in steps of a warp; `mask` tells whose
// lanes' rows start a run.
template <class Visit>
__forceinline__ void stretch(const int* ids, int m, int groups, int first, int end, Visit visit) {
  const int lane = threadIdx.x % 32;
  const auto id_of = [&](int row) {
    const int id = __ldg(ids + row);
    return id >= 0 && id < groups ? id : -1;
  };
#pragma unroll 4
  for (int row = first + lane; row - lane < end; row += 32) {
    const int id = row < end ? id_of(row) : -1;
    const bool starts = row < end && (row == 0 || id_of(row - 1) != id);
    visit(row, id, __ballot_sync(0xffffffff, starts));
  }
}

extern "C" __global__ void __launch_bounds__(kRunsThreads)
    kernel(const int* ids, int m, int groups, Span* spans) {
  __shared__ int counts[kWarps];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = ceil_div(m, kWarps);
  const int first = min(warp * rows, m), end = min(first + rows, m);

  int count = 0;
  stretch(ids, m, groups, first, end, [&](int, int, uint32_t mask) { count += __popc(mask); });
  if (lane == 0) counts[warp] = count;
  __syncthreads();

  int before = 0;
  for (int i = 0; i < warp; ++i) before += counts[i];
  stretch(ids, m, groups, first, end, [&](int row, int id, uint32_t mask) {
    if (mask >> lane & 1) {
      const int i = before + __popc(mask & (1u << lane) - 1);
      spans[i].start = row;
      spans[i].group = id;
      if (i > 0) spans[i - 1].end = row;
    }
    before += __popc(mask);
  });
  if (warp == kWarps - 1 && lane == 0) {
    spans[before].start = m;
    spans[before - 1].end = m;
  }
}

}  // namespace deepgemm::gemm
