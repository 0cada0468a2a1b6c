// The kernel that finds the runs of rows of one group, launched as csrc/gemm/handler.cc does.
#pragma once

#include "simulator.h"

#define kernel runs_kernel
#include "gemm/runs.cuh"
#undef kernel

namespace deepgemm::gemm {

inline void find_runs(const int* ids, int m, int groups, Span* spans) {
  sim::launch(kRunsCtas, kRunsThreads, kRunsCtas, [=] { runs_kernel(ids, m, groups, spans); });
}

}  // namespace deepgemm::gemm
