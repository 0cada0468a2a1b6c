// What the compiled variants of the transposition are, and what the host hands to them.
#pragma once

#include "device/scheduler.cuh"

namespace deepgemm::layout {

struct Params {
  const unsigned char* x;  // [batch, m, n]
  unsigned char* y;        // [batch, n, m]
  int m, n;
  TileGrid tiles;
};

struct Config {
  int element_bytes;  // 1, 2 or 4

  // A thread transposes a square of 16 bytes by as many rows as they hold elements; 16 x 16
  // threads, a square of such squares.
  static constexpr int kVector = 16;
  static constexpr int kSide = 16;
  constexpr int rows() const { return kVector / element_bytes; }  // and columns, of a thread
  constexpr int tile() const { return kSide * rows(); }
  constexpr int threads() const { return kSide * kSide; }
  constexpr int smem_bytes() const { return tile() * kSide * kVector; }
  constexpr int ctas(const Params& p) const { return p.tiles.count(); }
};

}  // namespace deepgemm::layout
