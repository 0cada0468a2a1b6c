// y[n, m] = x[m, n], by square tiles of 256 bytes a side in x and in y.
//
// A thread loads 16 bytes of each of a few rows, transposes this small square in registers, and
// leaves its rows, now 16 bytes of y's each, in shared memory. There the threads find 256
// neighbouring bytes of a row of y.
#pragma once

#include "device/numbers.cuh"
#include "layout/config.h"

namespace deepgemm::layout {

constexpr Config config{CONFIG};
constexpr int kRows = config.rows();
constexpr int kSide = Config::kSide;

// Four words of which each is a row of `4 / bytes` elements: afterwards, a column.
template <int bytes>
__forceinline__ void transpose_words(uint32_t (&x)[4 / bytes]) {
  if constexpr (bytes == 2) {
    const uint32_t low = __byte_perm(x[0], x[1], 0x5410);
    x[1] = __byte_perm(x[0], x[1], 0x7632);
    x[0] = low;
  } else if constexpr (bytes == 1) {
    const uint32_t even0 = __byte_perm(x[0], x[1], 0x6240), odd0 = __byte_perm(x[0], x[1], 0x7351);
    const uint32_t even1 = __byte_perm(x[2], x[3], 0x6240), odd1 = __byte_perm(x[2], x[3], 0x7351);
    x[0] = __byte_perm(even0, even1, 0x5410);
    x[1] = __byte_perm(odd0, odd1, 0x5410);
    x[2] = __byte_perm(even0, even1, 0x7632);
    x[3] = __byte_perm(odd0, odd1, 0x7632);
  }
}

// Where a tile has row `row` of y, 16 bytes for each `unit`. It depends on the thread that the row
// came from, so that no two threads of eight, be it of a row or of a column, meet in a bank.
__forceinline__ uint4& staged(uint4* tile, int row, int unit) {
  return tile[row * kSide + (unit ^ row / kRows)];
}

__forceinline__ void transpose_tile(const Params& p, uint4* tile) {
  constexpr int kPerWord = 4 / config.element_bytes;
  const int across = threadIdx.x % kSide, down = threadIdx.x / kSide;
  const Tile at = p.tiles(blockIdx.x);
  const int n0 = at.n * config.tile(), m0 = at.m * config.tile();
  const long long batch = (long long)at.batch * p.m * p.n;

  uint32_t x[kRows][4] = {};
  {
    const int n = n0 + across * kRows, m = m0 + down * kRows;
    const int pitch = p.n * config.element_bytes;
    const uint64_t policy = policy_of_reads(2ll * p.tiles.batch * p.m * pitch);
    const unsigned char* row = p.x + (batch + (long long)m * p.n + n) * config.element_bytes;
#pragma unroll
    for (int i = 0; i < kRows; ++i, row += pitch) {
      if (n >= p.n || m + i >= p.m) continue;
      const uint4 words = load_once(row, policy);
      x[i][0] = words.x, x[i][1] = words.y, x[i][2] = words.z, x[i][3] = words.w;
    }
  }
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    uint32_t columns[kPerWord][kRows / kPerWord];
#pragma unroll
    for (int i = 0; i < kRows; i += kPerWord) {
      uint32_t square[kPerWord];
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) square[j] = x[i + j][word];
      transpose_words<config.element_bytes>(square);
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) columns[j][i / kPerWord] = square[j];
    }
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      staged(tile, across * kRows + word * kPerWord + j, down) = {columns[j][0], columns[j][1],
                                                                  columns[j][2], columns[j][3]};
    }
  }
  __syncthreads();
  const int m = m0 + across * kRows;
  const int pitch = p.m * config.element_bytes;
  unsigned char* row = p.y + (batch + (long long)(n0 + down) * p.m + m) * config.element_bytes;
#pragma unroll
  for (int i = 0; i < kRows; ++i, row += (long long)kSide * pitch) {
    if (m >= p.m || n0 + i * kSide + down >= p.n) continue;
    store_result(row, staged(tile, i * kSide + down, across));
  }
}

}  // namespace deepgemm::layout

extern "C" __global__ void __launch_bounds__(deepgemm::layout::config.threads())
    kernel(const __grid_constant__ deepgemm::layout::Params p) {
  extern __shared__ uint4 memory[];
  deepgemm::wait_for_previous_kernel();
  deepgemm::let_next_kernel_start();
  deepgemm::layout::transpose_tile(p, memory);
}
