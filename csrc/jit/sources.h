// The device sources inside the extension; embed.py writes the definition at build time.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace deepgemm::jit {

// Name relative to csrc ("gemm/sm90.cuh") and text, in the order of the names.
const std::vector<std::pair<std::string, std::string>>& device_sources();

}  // namespace deepgemm::jit
