// csrc/device/wgmma.cuh for the simulator. A product reads its operands when it is waited for.
#pragma once

#include "device/ptx.cuh"

namespace deepgemm {

// Where a tile starts, how far the next box is, and the CTA whose it is.
inline uint64_t tile_descriptor(uint32_t shared, uint32_t box_bytes = 0) {
  return static_cast<uint64_t>(box_bytes) << 32 | shared >> 4;
}

inline uint64_t narrow_tile_descriptor(uint32_t shared) {
  return 1ull << 63 | tile_descriptor(shared);
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  sim::self().products.push_back(std::move(sim::self().product));
  sim::self().product.clear();
}
template <int in_flight>
void wgmma_wait() {
  auto& groups = sim::self().products;
  while (groups.size() > in_flight) {
    for (auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}
template <int count>
void pin(float (&)[count]) {}
template <int count>
void clear(float (&d)[count]) {
  for (float& x : d) x = 0;
}

inline float decode(const char* p, int type) {
  if (type == kBfloat16) return bfloat16_to_float(*reinterpret_cast<const unsigned short*>(p));
  const int mantissa_bits = type == kE4M3 ? 3 : 2, bias = type == kE4M3 ? 7 : 15;
  const int byte = static_cast<unsigned char>(*p);
  const int exponent = (byte & 0x7f) >> mantissa_bits, top = 0x7f >> mantissa_bits;
  const int mantissa = byte & ((1 << mantissa_bits) - 1);
  float x = exponent ? __builtin_ldexpf(mantissa + (1 << mantissa_bits), exponent - 1)
                     : __builtin_ldexpf(mantissa, 0);
  x = __builtin_ldexpf(x, 1 - bias - mantissa_bits);
  if (type == kE4M3 && (byte & 0x7f) == 0x7f) x = __builtin_nanf("");
  if (type == kE5M2 && exponent == top) x = mantissa ? __builtin_nanf("") : __builtin_inff();
  return byte & 0x80 ? -x : x;
}

// One row of an operand in a step of 32 bytes along K.
template <int type, bool mn_major>
void read_row(uint64_t descriptor, int row, float (&x)[32]) {
  constexpr int bytes = type == kBfloat16 ? 2 : 1;
  const uint32_t start = static_cast<uint32_t>(descriptor) << 4;
  const uint32_t box = descriptor >> 32, row_bytes = descriptor >> 63 ? 32 : 128;
  for (int k = 0; k < 32 / bytes; ++k) {
    const uint32_t at = mn_major ? start + row / 64 * box + k * 128 + row % 64 * bytes
                                 : start + row * row_bytes + k * bytes;
    x[k] = decode(sim::shared(swizzled(at, row_bytes), bytes), type);
  }
}

template <int columns, int a_type = kE4M3, int b_type = kE4M3, bool a_mn_major = false,
          bool b_mn_major = false>
void wgmma(float (&d)[columns / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(columns % 8 == 0 && columns <= 256);
  float* sums = d;
  sim::self().product.push_back([=] {
    constexpr int depth = a_type == kBfloat16 ? 16 : 32;
    const int thread = sim::self().index.x % 128, lane = thread % 32;
    float rows[2][32], column[32];
    for (int half = 0; half < 2; ++half) {
      read_row<a_type, a_mn_major>(a, thread / 32 * 16 + lane / 4 + half * 8, rows[half]);
    }
    for (int i = 0; i < columns / 4; ++i) {
      read_row<b_type, b_mn_major>(b, i / 2 * 8 + lane % 4 * 2 + i % 2, column);
      for (int half = 0; half < 2; ++half) {
        float& sum = sums[i / 2 * 4 + half * 2 + i % 2];
        float product = 0;
        for (int k = 0; k < depth; ++k) product += rows[half][k] * column[k];
        sum = accumulate ? sum + product : product;
      }
    }
  });
}

}  // namespace deepgemm
