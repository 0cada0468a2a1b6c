// The kernel that finds the runs of rows of one group, as a function for ctypes.
#include "gemm/runs.cuh"
#include "simulator.h"

extern "C" void run(const int* ids, int m, int groups, deepgemm::gemm::Span* spans) {
  using namespace deepgemm::gemm;
  sim::launch(kRunsCtas, kRunsThreads, kRunsCtas, [&] { kernel(ids, m, groups, spans); });
}
