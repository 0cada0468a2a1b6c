// The GEMM's kernel and the one that finds its groups, for one CONFIG, as a function for ctypes.
#include "gemm/plan.h"
#include "gemm/sm90.cuh"
#include "runs.h"
#include "simulator.h"
#include "tensor_map.h"

namespace deepgemm::gemm {
thread_local char memory[1];  // Its address alone is asked for.
}

extern "C" void run(const deepgemm::gemm::Operands* operands, int num_sms) {
  using namespace deepgemm::gemm;
  auto [params, clusters] = plan(config, num_sms, *operands);
  if (operands->spans) {
    find_runs(operands->groups[0], params.m, params.num_groups, operands->spans);
  }
  sim::launch(clusters * config.cluster(), config.threads(), config.cluster(),
              [&] { kernel(params); });
}
