// The search for runs of rows of one group, as a function for ctypes.
#include "runs.h"

extern "C" void run(const int* ids, int m, int groups, deepgemm::gemm::Span* spans) {
  deepgemm::gemm::find_runs(ids, m, groups, spans);
}
