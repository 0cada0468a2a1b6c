// Of a gated activation y = w f(gate) up, f being silu, all that its backward pass is quantised to:
//
//   d_gate = w dy up f'(gate),  d_up = w dy f(gate)       both along rows and along columns
//   y                                                     along columns
//   d_w = sum of dy f(gate) up
//
// by tiles of 128 x 128, of which gate and up are given in FP8:
//
//                8 columns
//   8 rows    thread 0  | 1 | ... | 15      A thread computes 8 rows of 8 columns of each result,
//             thread 16 | ...               rounds them to bfloat16, and keeps d_gate in registers
//             ...                           and the others in shared memory until the scales of
//             thread 240 | ...              all three are known. Then they are quantised in turn.
//                                           Eight rows of a column are 8 bytes of the transposed.
//
// Rows belong to groups, as quantize/sm90_tiles.cuh has them.
#pragma once

#include "quantize/activation.cuh"
#include "quantize/columns.cuh"
#include "quantize/groups.cuh"
#include "training/config.h"

namespace deepgemm::training {

using quantize::kRows;
using quantize::kVector;
using quantize::kVectors;

constexpr SwigluBackward config{CONFIG};

using Row = quantize::Vector<false>;

enum Result { kDGate, kDUp, kY, kResults };

// Of the transposed, eight bytes for each eight rows.
using Columns = uint2[kBlock][kBlock / kRows];

struct Shared {
  uint4 dy[kBlock][kVectors];    // a row's d_up takes the place of its dy,
  uint2 h[2][kBlock][kVectors];  // and y, by halves of a vector, that of gate and up
  Columns columns[2];            // of two results in turn
  quantize::ColumnScales<Row, kResults> of_columns;
};
static_assert(sizeof(Shared) == config.smem_bytes());

__forceinline__ void clear(const SwigluBackwardParams& p, int batch, int row) {
  const float scale = quantize::scale_of<false>(0, 0);
  quantize::clear_row<config.threads()>(p.dh, p.dh_scale, scale, p.m, 2 * p.k, batch, row);
  const int blocks = p.tiles.columns;
  for (int i = threadIdx.x; i < blocks; i += config.threads()) {
    p.d_weights[((long long)batch * p.m + row) * blocks + i] = 0;
  }
}

struct Tile {
  const SwigluBackwardParams& p;
  Shared& shared;
  int batch, m0, rows, k0;  // of dy
  int t;                    // the tile's number along the transposed
  int row, column;          // the thread's first, in the tile
  Row result[kRows];        // what is being quantised
  float of_row[2];          // reciprocals of scales of d_gate and d_up; lane l has row l % 8's

  // Where the thread's first row is in a matrix that is so wide.
  __forceinline__ long long at(int width) const {
    return ((long long)batch * p.m + m0 + row) * width + k0 + column;
  }

  // Where the scales of the tile's rows are, for a block of gate and up.
  __forceinline__ long long scale_at(int half) const {
    return ((long long)(batch * 2 + half) * (p.k / kBlock) + k0 / kBlock) * p.m + m0;
  }

  // All loads at once, by 16 bytes, which pass by L1. A warp loads what it alone computes with.
  __forceinline__ void load() {
    const auto* dy = static_cast<const unsigned short*>(p.dy) + at(p.k);
#pragma unroll
    for (int i = 0; i < kRows; ++i, dy += p.k) {
      copy_async_or_clear(&shared.dy[row + i][column / kVector], dy, row + i < rows);
    }
    const int first = threadIdx.x / 32 * 2 * kRows + threadIdx.x % 32 / 8, of_h = threadIdx.x % 8;
    const unsigned char* h = p.h + ((long long)batch * p.m + m0 + first) * 2 * p.k + k0 + of_h * 16;
#pragma unroll
    for (int i = 0; i < 2 * kRows; i += 4, h += 4LL * 2 * p.k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        copy_async_or_clear(&shared.h[half][first + i][of_h * 2], h + half * p.k, first + i < rows);
      }
    }
  }

  struct OfRow {
    float sum;  // of dy f(gate) up, but for up's scale
    Row::Largest largest[2];
  };

  // Leaves the thread's row i of d_gate in `result`, and those of d_up and y in their places.
  // Lane l of 16 has what row l % 8 is multiplied by.
  __forceinline__ OfRow compute_row(int i, float gate_scale, float up_scale, float weight) {
    const Row dy = waiting(kDUp, i), h = waiting(kY, i);
    const float of_gate = __shfl_sync(0xffffffff, gate_scale, i, 16);
    const float of_up = __shfl_sync(0xffffffff, up_scale, i, 16);
    const float of_row = __shfl_sync(0xffffffff, weight, i, 16);
    Row d_gate, d_up, y;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kVector; j += 2) {
      const float2 gate = from_e4m3(h.pairs[j / 4] >> j % 4 * 8);
      const float2 up = from_e4m3(h.pairs[2 + j / 4] >> j % 4 * 8);
      float d_gates[2], d_ups[2], ys[2];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const quantize::Activated f =
            quantize::activate<quantize::kSilu>((odd ? gate.y : gate.x) * of_gate);
        const float unscaled = odd ? up.y : up.x, weighted = unscaled * of_up;
        const float d = dy[j + odd] * f.value;
        sum += d * unscaled;
        d_gates[odd] = dy[j + odd] * weighted * f.slope;
        d_ups[odd] = d * of_row;
        ys[odd] = f.value * weighted;
      }
      d_gate.pairs[j / 2] = pack_bfloat16(d_gates[0], d_gates[1]);
      d_up.pairs[j / 2] = pack_bfloat16(d_ups[0], d_ups[1]);
      y.pairs[j / 2] = pack_bfloat16(ys[0], ys[1]);
    }
    result[i] = d_gate;
    shared.dy[row + i][column / kVector] = {d_up.pairs[0], d_up.pairs[1], d_up.pairs[2],
                                            d_up.pairs[3]};
    shared.h[0][row + i][column / kVector] = {y.pairs[0], y.pairs[1]};
    shared.h[1][row + i][column / kVector] = {y.pairs[2], y.pairs[3]};
    return {sum, {d_gate.largest(), d_up.largest()}};
  }

  template <int step>
  static __forceinline__ OfRow share_out(const OfRow& even, const OfRow& odd) {
    using quantize::share_out;
    return {share_out<step>(even.sum, odd.sum, [](float x, float y) { return x + y; }),
            {share_out<step>(even.largest[0], odd.largest[0], Row::larger_of),
             share_out<step>(even.largest[1], odd.largest[1], Row::larger_of)}};
  }

  // Of all columns; lane l of 16 gets row l % 8's. Each result is shared out as soon as there are
  // two, lest those of all rows are held at once.
  template <int first, int count, class... Factors>
  __forceinline__ OfRow compute_rows(Factors... factors) {
    if constexpr (count == 1) {
      return compute_row(first, factors...);
    } else {
      const OfRow x = compute_rows<first, count / 2>(factors...);
      const OfRow y = compute_rows<first + count / 2, count / 2>(factors...);
      return share_out<count / 2>(x, y);
    }
  }

  // Of d_gate, which is left in `result`, of d_up and of y.
  __forceinline__ void compute() {
    const int own = row + threadIdx.x % kRows;
    float scales[2] = {}, weight = own < rows ? 1 : 0;
    if (own < rows) {
      scales[0] = p.h_scale[scale_at(0) + own];
      scales[1] = p.h_scale[scale_at(1) + own];
      if (p.weights) weight = p.weights[(long long)batch * p.m + m0 + own];
    }
    wait_for_copies();
    __syncwarp();
    OfRow of_own = compute_rows<0, kRows>(scales[0], scales[1] * weight, weight);
    of_own = share_out<kRows>(of_own, of_own);
    const bool writes = threadIdx.x % 16 < kRows && own < rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = quantize::scale_of<false>(Row::amax(of_own.largest[half]), 0);
      if (writes) p.dh_scale[scale_at(half) + own] = scale;
      of_row[half] = reciprocal_of_normal(scale);
    }
    if (writes) {
      p.d_weights[((long long)batch * p.m + m0 + own) * p.tiles.columns + k0 / kBlock] =
          of_own.sum * scales[1];
    }
    shared.of_columns.give(kDGate, quantize::largest_of_columns(result));
#pragma unroll
    for (int which = kDUp; which <= kY; ++which) {
      Row largest;
#pragma unroll
      for (int i = 0; i < kRows; ++i) largest.take_larger(waiting(Result(which), i));
      shared.of_columns.give(which, largest);
    }
    const long long t_tile = (long long)batch * p.tiles.rows + t;
    shared.of_columns.find<false>(0, [&](int own, float scale) {
      const int which = own / kBlock, column = k0 + own % kBlock;
      if (which == kY) {
        p.t_y_scale[t_tile * p.k + column] = scale;
      } else {
        p.t_dh_scale[(t_tile * 2 + which) * p.k + column] = scale;
      }
    });
  }

  // The thread's vector of row i of what waits in the place of `which`.
  __forceinline__ Row waiting(Result which, int i) const {
    if (which == kDUp) {
      const uint4 x = shared.dy[row + i][column / kVector];
      return {{x.x, x.y, x.z, x.w}};
    }
    const uint2 x = shared.h[0][row + i][column / kVector];
    const uint2 y = shared.h[1][row + i][column / kVector];
    return {{x.x, x.y, y.x, y.y}};
  }

  __forceinline__ void take(Result which) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) result[i] = waiting(which, i);
  }

  __forceinline__ void quantise_rows(int half) const {
    unsigned char* address = p.dh + at(2 * p.k) + half * p.k;
#pragma unroll
    for (int i = 0; i < kRows; ++i, address += 2 * p.k) {
      const float same = __shfl_sync(0xffffffff, of_row[half], i, 16);
      const uint2 bytes = quantize::quantised<false>(result[i], [&](int) { return same; });
      if (row + i < rows) store_result(address, bytes);
    }
  }

  // To the tile's columns of `data` [columns, t_rows].
  __forceinline__ void quantise_columns(Result which, unsigned char* data) {
    float of_column[kVector];
    shared.of_columns.read(which, of_column);
    Columns& columns = shared.columns[which % 2];
    // Where they are depends on the column, so that threads of a row do not meet in a bank.
    const int unit = row / kRows ^ column / kVector;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      unsigned short pairs[kRows / 2];
#pragma unroll
      for (int i = 0; i < kRows; i += 2) {
        pairs[i / 2] = to_fp8<false>(multiply_flushed(result[i][j], of_column[j]),
                                     multiply_flushed(result[i + 1][j], of_column[j]));
      }
      columns[column + j][unit] = {join(pairs[0], pairs[1]), join(pairs[2], pairs[3])};
    }
    __syncthreads();
    const int t_unit = threadIdx.x % 8;  // of 16 bytes
#pragma unroll
    for (int j = 0; j < kBlock * 8 / config.threads(); ++j) {
      const int of_tile = j * (config.threads() / 8) + threadIdx.x / 8;
      const int place = of_tile / kVector;
      const uint4 both =
          *reinterpret_cast<const uint4*>(&columns[of_tile][2 * (t_unit ^ place / 2)]);
      const uint4 bytes = place % 2 ? uint4{both.z, both.w, both.x, both.y} : both;
      const long long at = (long long)(k0 + of_tile) * p.t_rows + t * kBlock + t_unit * 16;
      store_result(data + at, bytes);
    }
  }

  __forceinline__ void run() {
    load();
    compute();
    unsigned char* t_dh = p.t_dh + (long long)batch * 2 * p.k * p.t_rows;
    quantise_rows(0);
    quantise_columns(kDGate, t_dh);
    take(kDUp);
    quantise_rows(1);
    quantise_columns(kDUp, t_dh + (long long)p.k * p.t_rows);
    take(kY);
    quantise_columns(kY, p.t_y + (long long)batch * p.k * p.t_rows);
  }
};

}  // namespace deepgemm::training

extern "C" __global__ void __launch_bounds__(deepgemm::training::config.threads(), 2)
    kernel(const __grid_constant__ deepgemm::training::SwigluBackwardParams p) {
  using namespace deepgemm::training;
  extern __shared__ uint4 memory[];
  deepgemm::wait_for_previous_kernel();
  deepgemm::let_next_kernel_start();
  const int tiles = p.tiles.count();
  if (int(blockIdx.x) >= tiles) {
    return deepgemm::quantize::clear_rows_of_none(
        blockIdx.x - tiles, p.group_sizes, p.groups, p.m,
        [&](int batch, int row) { clear(p, batch, row); });
  }
  Tile tile{p, *reinterpret_cast<Shared*>(memory)};
  const auto [batch, t, column] = p.tiles(blockIdx.x);
  tile.batch = batch;
  tile.t = t;
  tile.k0 = column * kBlock;
  const deepgemm::quantize::Groups groups(p.group_sizes + tile.batch * p.groups, p.groups, p.m,
                                          tile.t * kBlock);
  tile.m0 = groups.m0;
  tile.rows = groups.rows;
  tile.row = threadIdx.x / 16 * kRows;
  tile.column = threadIdx.x % 16 * kVector;
  tile.run();
}
