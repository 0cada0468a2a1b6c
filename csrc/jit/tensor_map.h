// Descriptions of tensors for the copy engine (TMA).
#pragma once

#include <cstdint>
#include <initializer_list>

#include "jit/cuda.h"

namespace deepgemm::jit {

// A tiled map of a tensor. Sizes and box are innermost first; strides_bytes are those of the second
// dimension on. What a box has outside the tensor reads as zero and is not written.
CUtensorMap tensor_map(const void* address, CUtensorMapDataType type,
                       std::initializer_list<uint64_t> sizes,
                       std::initializer_list<uint64_t> strides_bytes,
                       std::initializer_list<uint32_t> box, CUtensorMapSwizzle swizzle);

}  // namespace deepgemm::jit
