#include "jit/tensor_map.h"

namespace deepgemm::jit {

CUtensorMap tensor_map(const void* address, CUtensorMapDataType type,
                       std::initializer_list<uint64_t> sizes,
                       std::initializer_list<uint64_t> strides_bytes,
                       std::initializer_list<uint32_t> box, CUtensorMapSwizzle swizzle) {
  static constexpr uint32_t kDense[5] = {1, 1, 1, 1, 1};  // five dimensions are the most
  CUtensorMap map;
  check(
      "cuTensorMapEncodeTiled",
      driver().cuTensorMapEncodeTiled(
          &map, type, static_cast<uint32_t>(sizes.size()), const_cast<void*>(address),
          sizes.begin(), strides_bytes.begin(), box.begin(), kDense, CU_TENSOR_MAP_INTERLEAVE_NONE,
          swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

}  // namespace deepgemm::jit
