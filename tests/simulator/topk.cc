// The kernel of the indexer's top-k, for one CONFIG, as a function for ctypes.
#include "apart.h"
#include "attention/sm90_topk.cuh"
#include "simulator.h"

namespace deepgemm::attention {
thread_local char memory[sim::Cta::kBytes];
}

extern "C" int run(const deepgemm::attention::TopkParams* params, int rows) {
  using namespace deepgemm::attention;
  return sim::apart([&] { sim::launch(rows, kThreads, 1, [&] { kernel(*params); }, memory); });
}
