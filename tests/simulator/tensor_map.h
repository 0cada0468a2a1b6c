// csrc/jit/tensor_map.cc for the simulator.
#pragma once

#include "device/ptx.cuh"
#include "jit/tensor_map.h"

namespace deepgemm::jit {

inline CUtensorMap tensor_map(const void* address, CUtensorMapDataType type,
                              std::initializer_list<uint64_t> sizes,
                              std::initializer_list<uint64_t> strides_bytes,
                              std::initializer_list<uint32_t> box, CUtensorMapSwizzle swizzle) {
  Map map = {};
  map.data = static_cast<char*>(const_cast<void*>(address));
  map.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8      ? 1
                      : type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2
                                                                 : 4;
  map.swizzle_bytes = 16 << swizzle;
  // Dimensions that it does not have.
  std::fill_n(map.sizes, 4, 1);
  std::fill_n(map.box, 4, 1);
  map.strides[0] = map.element_bytes;
  std::copy(sizes.begin(), sizes.end(), map.sizes);
  std::copy(strides_bytes.begin(), strides_bytes.end(), map.strides + 1);
  std::copy(box.begin(), box.end(), map.box);
  CUtensorMap bytes = {};
  std::memcpy(&bytes, &map, sizeof map);
  return bytes;
}

}  // namespace deepgemm::jit
