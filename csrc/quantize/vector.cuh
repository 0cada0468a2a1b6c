// What a thread quantises at once: eight neighbours of a row, by a scale that lanes find together.
#pragma once

#include "device/numbers.cuh"
#include "quantize/config.h"

namespace deepgemm::quantize {

constexpr int kVector = 8;

// As they lie in memory.
template <bool float32>
struct Vector;

template <>
struct Vector<false> {
  using Element = unsigned short;  // the bits of a bfloat16
  uint32_t pairs[4] = {};

  __forceinline__ void load(const Element* address, uint64_t policy) {
    const uint4 x = load_once(address, policy);
    pairs[0] = x.x, pairs[1] = x.y, pairs[2] = x.z, pairs[3] = x.w;
  }
  __forceinline__ float operator[](int i) const {
    return __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000 : pairs[i / 2] << 16);
  }
  static __forceinline__ float number(Element x) { return __uint_as_float(uint32_t(x) << 16); }
  // Of each two elements the larger one, but for its sign.
  __forceinline__ void take_larger(const Vector& other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = larger_bfloat16s(pairs[i], other.pairs[i]);
  }
  // The same of what lane `lane ^ bits` has.
  __forceinline__ void take_larger_of_lane(int bits) {
#pragma unroll
    for (uint32_t& pair : pairs) {
      pair = larger_bfloat16s(pair, __shfl_xor_sync(0xffffffff, pair, bits));
    }
  }
  // The largest of the even elements and that of the odd ones.
  using Largest = uint32_t;
  static __forceinline__ Largest larger_of(Largest x, Largest y) { return larger_bfloat16s(x, y); }
  static __forceinline__ float amax(Largest x) {
    return larger(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
  }
  __forceinline__ Largest largest() const {
    return larger_of(larger_of(pairs[0], pairs[1]), larger_of(pairs[2], pairs[3]));
  }
  __forceinline__ float amax() const { return amax(largest()); }
};

template <>
struct Vector<true> {
  using Element = float;
  float elements[kVector] = {};

  __forceinline__ void load(const Element* address, uint64_t policy) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      const uint4 x = load_once(address + i, policy);
      elements[i] = __uint_as_float(x.x);
      elements[i + 1] = __uint_as_float(x.y);
      elements[i + 2] = __uint_as_float(x.z);
      elements[i + 3] = __uint_as_float(x.w);
    }
  }
  __forceinline__ float operator[](int i) const { return elements[i]; }
  static __forceinline__ float number(Element x) { return x; }
  __forceinline__ void take_larger(const Vector& other) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) elements[i] = larger(elements[i], other.elements[i]);
  }
  __forceinline__ void take_larger_of_lane(int bits) {
#pragma unroll
    for (float& x : elements) x = larger(x, __shfl_xor_sync(0xffffffff, x, bits));
  }
  using Largest = float;
  static __forceinline__ Largest larger_of(Largest x, Largest y) { return larger(x, y); }
  static __forceinline__ float amax(Largest x) { return x; }
  __forceinline__ Largest largest() const {
    Largest result = elements[0];
#pragma unroll
    for (int i = 1; i < kVector; ++i) result = larger(result, elements[i]);
    return result;
  }
  __forceinline__ float amax() const { return largest(); }
};

// Reduces two values over two lanes, whose numbers differ in the bit `step`: the lane that has it
// gets the result of `odd`, the other one that of `even`.
template <int step, class T, class Reduce>
__forceinline__ T share_out(T even, T odd, Reduce reduce) {
  const bool has = threadIdx.x & step;
  return reduce(has ? odd : even, __shfl_xor_sync(0xffffffff, has ? even : odd, step));
}

// Reduces `count` values of each lane, a power of two, over 16 lanes: lane l gets the result of
// value l % count. Two lanes first share out their values between them, then four, and so on.
template <int step = 1, class T, class Reduce, int count>
__forceinline__ T reduce_over_16_lanes(const T (&x)[count], Reduce reduce) {
  if constexpr (step == 16) {
    return x[0];
  } else {
    T y[ceil_div(count, 2)];
#pragma unroll
    for (int i = 0; i < count; i += 2) y[i / 2] = share_out<step>(x[i], x[(i + 1) % count], reduce);
    return reduce_over_16_lanes<2 * step>(y, reduce);
  }
}

// The scale of a block whose largest magnitude is `amax`, of either sign; NaN if that is not
// finite. None is less than the least normal number: then its reciprocal is normal too.
template <bool e5m2>
__forceinline__ float scale_of(float amax, int round_up) {
  constexpr float reciprocal = 1.0f / (e5m2 ? 57344.0f : 448.0f);
  amax = fabsf(amax);
  float scale = fmaxf(amax * reciprocal, 0x1p-126f);
  if (round_up) scale = __uint_as_float((__float_as_uint(scale) + 0x7fffff) & 0xff800000);
  return amax < __int_as_float(0x7f800000) ? scale : __int_as_float(0x7fffffff);
}

// `x[i]`, each times `reciprocal(i)` of its scale, as bytes.
template <bool e5m2, class Elements, class Reciprocal>
__forceinline__ uint2 quantised(const Elements& x, Reciprocal reciprocal) {
  unsigned short pairs[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    pairs[i / 2] = to_fp8<e5m2>(multiply_flushed(x[i], reciprocal(i)),
                                multiply_flushed(x[i + 1], reciprocal(i + 1)));
  }
  return {join(pairs[0], pairs[1]), join(pairs[2], pairs[3])};
}

}  // namespace deepgemm::quantize
