// Types that host and device code share. NVRTC brings no standard headers, so none is included.
#pragma once

namespace deepgemm {

// The same 128 opaque bytes as the driver's CUtensorMap; the copy engine wants them 64-byte
// aligned.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

enum Element { kE4M3, kE5M2, kBfloat16 };

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace deepgemm
