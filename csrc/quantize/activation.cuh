// The activations that gate: f(x) and f'(x).
#pragma once

#include "device/numbers.cuh"
#include "quantize/config.h"

namespace deepgemm::quantize {

struct Activated {
  float value, slope;
};

// 1 / (1 + exp(-x)), to about two units in the last place.
__forceinline__ float sigmoid(float x) {
  return reciprocal_approximate(1 + exp2_approximate(-1.4426950408889634f * x));
}

template <int activation>
__forceinline__ Activated activate(float x) {
  if constexpr (activation == kSilu) {
    const float s = sigmoid(x), value = x * s;
    return {value, s + value * (1 - s)};
  } else if constexpr (activation == kGelu) {
    const float half = 0.5f * erfcf(-0.70710678118654752f * x);
    const float density = 0.39894228040143268f * exp2_approximate(-0.72134752044448170f * x * x);
    return {x * half, half + x * density};
  } else {
    // x (1 + tanh(y)) / 2 = x sigmoid(2 y), where beyond 20 the sigmoid is 0 or 1, and the cube of
    // what is far beyond would be infinite.
    const float near = fabsf(x) > 20 ? copysignf(20, x) : x;
    const float s = sigmoid(1.5957691216057308f * (near + 0.044715f * near * near * near));
    const float twice_slope = 1.5957691216057308f * (1 + 0.134145f * near * near);
    return {x * s, s * (1 + x * (1 - s) * twice_slope)};
  }
}

}  // namespace deepgemm::quantize
