// The kernel of the indexer's logits, for one CONFIG, as a function for ctypes.
#include "apart.h"
#include "attention/plan.h"
#include "attention/sm90_logits.cuh"
#include "simulator.h"
#include "tensor_map.h"

namespace deepgemm::attention {
thread_local char shared[sim::Cta::kBytes];
}

extern "C" int run(const deepgemm::attention::Operands* operands, int num_sms) {
  using namespace deepgemm::attention;
  const Params params = params_of(config, num_sms, *operands);
  return sim::apart(
      [&] { sim::launch(num_sms, config.threads(), 1, [&] { kernel(params); }, shared); });
}
