// csrc/device/numbers.cuh for the simulator.
#pragma once

#include "device/ptx.cuh"

namespace deepgemm {

inline uint64_t policy_of_reads(long long) { return 0; }
inline uint4 load_once(const void* address, uint64_t) {
  return *static_cast<const uint4*>(address);
}

template <class T>
void store_result(void* address, T x) {
  *static_cast<T*>(address) = x;
}

inline float larger(float x, float y) {
  if (std::isnan(x) || std::isnan(y)) return NAN;
  const float magnitude = max(fabsf(x), fabsf(y));
  return std::signbit(x) != std::signbit(y) ? -magnitude : magnitude;
}

inline uint32_t larger_bfloat16s(uint32_t x, uint32_t y) {
  const auto half = [](float x, float y) { return __float_as_uint(larger(x, y)); };
  return half(__uint_as_float(x << 16), __uint_as_float(y << 16)) >> 16 |
         (half(__uint_as_float(x & 0xffff0000), __uint_as_float(y & 0xffff0000)) & 0xffff0000);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x; }

inline float multiply_flushed(float x, float y) {
  return flushed(std::fma(flushed(x), flushed(y), 0.0f));
}

inline float exp2_approximate(float x) { return flushed(std::exp2(x)); }
inline float reciprocal_approximate(float x) { return flushed(1 / x); }
inline float reciprocal_of_normal(float x) { return 1 / x; }

// Sign, `exponent` bits and the rest of the mantissa, by the definition of rounding.
template <bool e5m2>
uint32_t fp8(float x) {
  constexpr int mantissa = e5m2 ? 2 : 3, least = e5m2 ? -14 : -6;
  constexpr float largest = e5m2 ? 57344 : 448;
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  const float magnitude = min(fabsf(x), largest);
  if (magnitude == 0) return sign;
  const int exponent = max(std::ilogb(magnitude), least);
  // Steps of the mantissa; a step too many is the next exponent's first. nearbyint: ties to even.
  const int steps = std::nearbyint(std::ldexp(magnitude, mantissa - exponent));
  return sign | uint32_t(steps + (exponent - least << mantissa));
}

template <bool e5m2>
unsigned short to_fp8(float x, float y) {
  return fp8<e5m2>(x) | fp8<e5m2>(y) << 8;
}

inline float2 from_e4m3(uint32_t bytes) {
  const auto of = [](uint32_t byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float magnitude = (byte & 0x7f) == 0x7f ? NAN
                            : exponent            ? std::ldexp(8 + mantissa, exponent - 10)
                                                  : std::ldexp(mantissa, -9);
    return byte & 0x80 ? -magnitude : magnitude;
  };
  return {of(bytes & 0xff), of(bytes >> 8 & 0xff)};
}

inline uint32_t join(unsigned short low, unsigned short high) { return high << 16 | low; }

}  // namespace deepgemm
