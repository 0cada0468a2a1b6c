// spans[i] = the i-th run of rows of one group, for the id of each row's group, and spans[m - i]
// the i-th run of rows of none. Behind the last ones, between the two, a span that starts at m.
//
// One cluster. Each warp takes a stretch of rows and has all of their ids under way at once. It
// marks where runs start, tells all CTAs how many, learns how many start before its own, and writes
// them.
#pragma once

#include "device/ptx.cuh"
#include "gemm/config.h"

namespace deepgemm::gemm {

// Of a warp through its stretch, at most: a lane's marks are the bits of a word.
constexpr int kSteps = 32;

// Runs of groups and runs of none.
struct Count {
  int of_groups = 0, of_none = 0;

  __forceinline__ Count operator+(Count x) const {
    return {of_groups + x.of_groups, of_none + x.of_none};
  }
};

__forceinline__ Count count(uint32_t starts, uint32_t none) {
  return {__popc(starts & ~none), __popc(starts & none)};
}

__forceinline__ Count sum_of_lanes(Count x) {
  return {int(__reduce_add_sync(0xffffffff, x.of_groups)),
          int(__reduce_add_sync(0xffffffff, x.of_none))};
}

// Where a CTA is told, of one chunk of rows, how many runs start in each warp's stretch.
struct Told {
  uint32_t barrier;  // counts the bytes that are there

  __forceinline__ uint32_t by(int warp) const { return barrier + (1 + warp) * kToldBytes; }
  __forceinline__ void tell_all(int warp, Count own) const {
    const int lane = threadIdx.x % 32;
    if (lane >= kRunsCtas) return;
    const float x[4] = {__int_as_float(own.of_groups), __int_as_float(own.of_none)};
    send(at_cta(by(warp), lane), at_cta(barrier, lane), x);
  }
  __forceinline__ Count operator[](int warp) const {
    const uint4 x = load_shared_quad(by(warp));
    return {int(x.x), int(x.y)};
  }
};

extern "C" __global__ void __launch_bounds__(kRunsThreads)
    kernel(const int* ids, int m, int groups, Span* spans) {
  extern __shared__ __align__(16) char memory[];
  // While some still read of one chunk, others may tell of the next one.
  const auto told = [&](int number) {
    return Told{shared_address(memory) + number % 2 * (kRunsSharedBytes / 2)};
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(told(i).barrier, 1);
    fence_barrier_init();
  }
  cluster_arrive();
  wait_for_previous_kernel();
  const int warp = blockIdx.x * (kRunsThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto id_of = [&](int row) {
    const int id = ids[row];
    return id >= 0 && id < groups ? id : -1;
  };
  // Behind so many: the next run of the id's kind, or with `back` of 1 the last one.
  const auto span_of = [&](int id, Count before, int back = 0) -> Span& {
    return spans[id < 0 ? m - (before.of_none - back) : before.of_groups - back];
  };

  Count before;
  for (int number = 0, chunk = 0; chunk < m; ++number, chunk += kRunsWarps * 32 * kSteps) {
    // All warps have a share of a short chunk.
    const int steps = min(kSteps, ceil_div(m - chunk, kRunsWarps * 32));
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
    const Count own = sum_of_lanes(count(starts, none));
    const Told all = told(number);
    if (threadIdx.x == 0) barrier_arrive_expect(all.barrier, kRunsWarps * kToldBytes);
    if (number == 0) cluster_wait();  // every CTA has set up its barriers
    all.tell_all(warp, own);
    barrier_wait(all.barrier, number / 2 % 2);
    // The GEMM is there when the runs are; earlier, it would but wait.
    let_next_kernel_start();

    Count run, total;
#pragma unroll
    for (int other = lane; other < kRunsWarps; other += 32) {
      total = total + all[other];
      if (other < warp) run = run + all[other];
    }
    run = before + sum_of_lanes(run);
    before = before + sum_of_lanes(total);
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
  }
  if (warp == 0 && lane == 0) {
    spans[before.of_groups].start = spans[m - before.of_none].start = m;
    span_of(id_of(m - 1), before, 1).end = m;
  }
}

}  // namespace deepgemm::gemm
