// data[m, k] = FP8(x[m, k] / scale), and the same for the transposed, by tiles of 128 x 128:
//
//   per channel   scale[m / 128, k] = max over the tile's rows |x| / largest
//   per block     scale[m / 128, k / 128] = max over the tile |x| / largest, and the same numbers
//                 in t_data[k, m] and t_scale[k / 128, m / 128]
//   both ways     scale[m, k / 128] and data, and t_scale[k, t / 128] and t_data[k, t], t being m
//
//                 8 columns
//   8 rows    thread 0  | 1 | ... | 15      A thread holds 8 rows of 8 columns in registers, so
//             thread 16 | ...               that x is read once. Each of its columns is 8 bytes of
//             ...                           the transposed, which go through shared memory to where
//             thread 240 | ...              they are neighbours.
//
// Both ways, rows may belong to groups, one after another. Then each group begins a tile, zeros
// fill up its last one, and t runs over these; rows of no group are zero.
#pragma once

#include "quantize/columns.cuh"
#include "quantize/groups.cuh"

namespace deepgemm::quantize {

constexpr TilesConfig config{CONFIG};

// A multiprocessor's, with 32 KB of x in flight each.
constexpr int kCtas = config.float32 ? 2 : config.tiling == kPerBlockBothWays ? 3 : 4;

using Input = Vector<config.float32>;

struct Shared {
  ColumnScales<Input, 1> of_columns;
  uint2 columns[kBlock][16];  // of the transposed, 8 bytes of it for each 8 rows of x
};
static_assert(sizeof(Shared) == config.smem_bytes() && config.threads() == kWarps * 32);

__forceinline__ void clear(const TilesParams& p, int batch, int row) {
  const float scale = scale_of<config.e5m2>(0, p.round_up);
  clear_row<config.threads()>(p.data, p.scale, scale, p.m, p.k, batch, row);
}

struct Tile {
  const TilesParams& p;
  Shared& shared;
  int batch, m0, rows, k0;  // of x
  int t;                    // the tile's number along the transposed
  int row, column;          // the thread's first, in the tile
  Input x[kRows];

  // For each of the thread's rows its number, where it begins in an array like x, and whether
  // there is such a row.
  template <class Element, class F>
  __forceinline__ void for_rows(Element* array, F f) {
    const int valid = k0 + column < p.k ? rows - row : 0;
    Element* address = array + ((long long)batch * p.m + m0 + row) * p.k + k0 + column;
#pragma unroll
    for (int i = 0; i < kRows; ++i, address += p.k) f(i, address, i < valid);
  }

  __forceinline__ void load() {
    const uint64_t policy = policy_of_reads(config.bytes(p));
    for_rows(static_cast<const Input::Element*>(p.x), [&](int i, auto address, bool valid) {
      if (valid) x[i].load(address, policy);
    });
  }

  // `of_column[j]` is the reciprocal of the scale of the thread's column j.
  __forceinline__ void store(const float (&of_column)[kVector]) {
    for_rows(p.data, [&](int i, unsigned char* address, bool valid) {
      const uint2 bytes = quantised<config.e5m2>(x[i], [&](int j) { return of_column[j]; });
      if (valid) store_result(address, bytes);
    });
  }

  // Of the tile's columns, to an array of all scales of such.
  __forceinline__ void scale_columns(float* scales, float (&of_column)[kVector]) {
    float* scale_at = scales + ((long long)batch * p.tiles.rows + t) * p.k + k0;
    shared.of_columns.give(0, largest_of_columns(x));
    shared.of_columns.find<config.e5m2>(p.round_up, [&](int own, float scale) {
      if (k0 + own < p.k) scale_at[own] = scale;
    });
    shared.of_columns.read(0, of_column);
  }

  __forceinline__ void quantise_columns() {
    float of_column[kVector];
    scale_columns(p.scale, of_column);
    store(of_column);
  }

  __forceinline__ void quantise_block() {
    float amax = largest_of_columns(x).amax();
    amax = larger(amax, __shfl_xor_sync(0xffffffff, amax, 16));
    const float of_lanes[] = {amax};
    float* of_warps = shared.of_columns.reciprocal;
    of_warps[threadIdx.x / 32] = reduce_over_16_lanes(of_lanes, larger);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWarps; ++i) amax = larger(amax, of_warps[i]);
    const float scale = scale_of<config.e5m2>(amax, p.round_up);
    if (threadIdx.x == 0) {
      const long long blocks = (long long)p.tiles.rows * p.tiles.columns, b = k0 / kBlock;
      p.scale[batch * blocks + (long long)t * p.tiles.columns + b] = scale;
      if constexpr (config.tiling == kPerBlockBothWays) {
        p.t_scale[batch * blocks + b * p.tiles.rows + t] = scale;
      }
    }
    const float same = __frcp_rn(scale);
    const float of_column[] = {same, same, same, same, same, same, same, same};
    store(of_column);
    if constexpr (config.tiling == kPerBlockBothWays) store_transposed(of_column);
  }

  // Writes the scales of the thread's rows; lane i of 8 gets the reciprocal of row i's.
  __forceinline__ float scale_rows() const {
    Input::Largest of_rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) of_rows[i] = x[i].largest();
    const float amax = Input::amax(reduce_over_16_lanes(of_rows, Input::larger_of));
    const float scale = scale_of<config.e5m2>(amax, p.round_up);
    const int own = row + threadIdx.x % kRows;
    if (threadIdx.x % 16 < kRows && own < rows)
      p.scale[((long long)batch * p.tiles.columns + k0 / kBlock) * p.m + m0 + own] = scale;
    return __frcp_rn(scale);
  }

  __forceinline__ void quantise_both_ways() {
    const float of_row = scale_rows();
    for_rows(p.data, [&](int i, unsigned char* address, bool valid) {
      const float same = __shfl_sync(0xffffffff, of_row, i, 16);
      const uint2 bytes = quantised<config.e5m2>(x[i], [&](int) { return same; });
      if (valid) store_result(address, bytes);
    });
    float of_column[kVector];
    scale_columns(p.t_scale, of_column);
    store_transposed(of_column);
  }

  __forceinline__ void store_transposed(const float (&of_column)[kVector]) {
    // Where they are in shared memory depends on the column, so that neither the threads of a row
    // here nor those of a column below, of which each takes two units, meet in a bank.
    const int unit = row / kRows ^ column / kVector;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const auto y = [&](int i) { return multiply_flushed(x[i][j], of_column[j]); };
      const auto pair = [&](int i) { return to_fp8<config.e5m2>(y(i), y(i + 1)); };
      shared.columns[column + j][unit] = {join(pair(0), pair(2)), join(pair(4), pair(6))};
    }
    __syncthreads();
    const int t_unit = threadIdx.x % 8 * 2;
    const int t0 = t * kBlock + t_unit * kRows;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int of_x = j * 32 + threadIdx.x / 8;
      const uint2 first = shared.columns[of_x][t_unit ^ of_x / kVector];
      const uint2 second = shared.columns[of_x][(t_unit + 1) ^ of_x / kVector];
      if (k0 + of_x < p.k && t0 < p.t_rows) {
        const long long at = ((long long)batch * p.k + k0 + of_x) * p.t_rows + t0;
        store_result(p.t_data + at, uint4{first.x, first.y, second.x, second.y});
      }
    }
  }
};

}  // namespace deepgemm::quantize

extern "C" __global__ void __launch_bounds__(deepgemm::quantize::config.threads(),
                                             deepgemm::quantize::kCtas)
    kernel(const __grid_constant__ deepgemm::quantize::TilesParams p) {
  using namespace deepgemm::quantize;
  extern __shared__ uint4 memory[];
  deepgemm::wait_for_previous_kernel();
  deepgemm::let_next_kernel_start();
  const int tiles = p.tiles.count();
  if constexpr (config.tiling == kBothWays) {
    if (int(blockIdx.x) >= tiles) {
      return clear_rows_of_none(blockIdx.x - tiles, p.group_sizes, p.groups, p.m,
                                [&](int batch, int row) { clear(p, batch, row); });
    }
  }
  Tile tile{p, *reinterpret_cast<Shared*>(memory)};
  const auto [batch, t, column] = p.tiles(blockIdx.x);
  tile.batch = batch;
  tile.t = t;
  tile.k0 = column * kBlock;
  tile.m0 = tile.t * kBlock;
  tile.rows = min(p.m - tile.m0, kBlock);
  if (config.tiling == kBothWays && p.group_sizes) {
    const Groups groups(p.group_sizes + tile.batch * p.groups, p.groups, p.m, tile.m0);
    tile.m0 = groups.m0;
    tile.rows = groups.rows;
  }
  tile.row = threadIdx.x / 16 * kRows;
  tile.column = threadIdx.x % 16 * kVector;
  tile.load();
  if constexpr (config.tiling == kPerChannel) {
    tile.quantise_columns();
  } else if constexpr (config.tiling == kPerBlock || config.tiling == kPerBlockBothWays) {
    tile.quantise_block();
  } else {
    tile.quantise_both_ways();
  }
}
