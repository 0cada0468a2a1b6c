// Types that host and device code share. NVRTC brings no standard headers, so none is included.
#pragma once

namespace deepgemm {

// The same 128 opaque bytes as the driver's CUtensorMap; the copy engine wants them 64-byte
// aligned.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

enum Element { kE4M3, kE5M2, kBfloat16 };

// An element of a result; of bfloat16 its bits.
template <bool float32>
struct OutType {
  using type = float;
};
template <>
struct OutType<false> {
  using type = unsigned short;
};

// Whether L2 can hold a good part of so many bytes. Then what is read once should leave it first,
// which spares what waits there to be written. Of more, lines in their usual order are faster.
constexpr bool l2_may_hold(long long bytes) { return bytes <= 90 << 20; }

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Divides numbers from 0 on by what the host knows, in two instructions. A division takes a GPU
// some 150 clocks, for which the first loads of a kernel would wait.
struct Divisor {
  unsigned magic;  // 2^shift over the divisor, rounded up, or one more
  int shift;       // 31 and the divisor's bits

  static constexpr Divisor of(int divisor) {
    int shift = 31;
    while (1ll << (shift - 31) < divisor) ++shift;
    return {static_cast<unsigned>((1ull << shift) / divisor + 1), shift};
  }

  constexpr int operator()(int x) const {
    return static_cast<int>(static_cast<unsigned long long>(magic) * x >> shift);
  }
};

// Registers move from a producing warpgroup, which needs few, to those that consume; a launch gives
// each thread the same share of 65,536, in multiples of 8, and the shares cannot grow beyond what
// it gave.
constexpr int consumer_registers(int consumers, int producer_registers) {
  const int launched = 65536 / (128 * (consumers + 1)) / 8 * 8;
  return (launched + (launched - producer_registers) / consumers) / 8 * 8;
}

}  // namespace deepgemm
