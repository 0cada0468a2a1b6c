// The GEMM's kernel and the one that finds its groups, for one CONFIG, as a function for ctypes.
#include "gemm/plan.h"
#include "gemm/sm90.cuh"
#include "simulator.h"

#define kernel runs_kernel
#include "gemm/runs.cuh"
#undef kernel

namespace deepgemm {

namespace gemm {
thread_local char memory[1];  // Its address alone is asked for.
}

jit::CUtensorMap jit::tensor_map(const void* address, CUtensorMapDataType type,
                                 std::initializer_list<uint64_t> sizes,
                                 std::initializer_list<uint64_t> strides_bytes,
                                 std::initializer_list<uint32_t> box, CUtensorMapSwizzle swizzle) {
  Map map = {};
  map.data = static_cast<char*>(const_cast<void*>(address));
  map.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 1;
  map.swizzle_bytes = 16 << swizzle;
  map.strides[0] = map.element_bytes;
  std::copy(sizes.begin(), sizes.end(), map.sizes);
  std::copy(strides_bytes.begin(), strides_bytes.end(), map.strides + 1);
  std::copy(box.begin(), box.end(), map.box);
  CUtensorMap bytes = {};
  std::memcpy(&bytes, &map, sizeof map);
  return bytes;
}

}  // namespace deepgemm

extern "C" void run(const deepgemm::gemm::Operands* operands, int num_sms) {
  using namespace deepgemm::gemm;
  auto [params, clusters] = plan(config, num_sms, *operands);
  if (config.groups == kContiguous) {
    sim::launch(1, kRunsThreads, 1, [&] {
      runs_kernel(operands->groups[0], params.m, params.num_groups, operands->spans);
    });
  }
  sim::launch(clusters * config.cluster(), config.threads(), config.cluster(),
              [&] { kernel(params); });
}
