// SHA-256 (FIPS 180-4), for cache keys and checksums.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace deepgemm::jit {

class Sha256 {
 public:
  // Each field goes in behind its length, so that no two lists of fields hash alike.
  Sha256& field(std::string_view bytes);
  std::string hex();  // ends the hash

 private:
  void update(const void* data, size_t size);
  void compress(const uint8_t* block);

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> block_;
  uint64_t size_ = 0;
};

}  // namespace deepgemm::jit
