// What the compiled variants of the quantising kernels are, and what the host hands to them.
#pragma once

#include "device/scheduler.cuh"

namespace deepgemm::quantize {

constexpr int kBlock = 128;  // elements along a dim that share a scale

// What sm90_rows.cuh quantises.
enum Function : int {
  kCast,
  kScaled,     // a cast by scales that are given
  kWholeRows,  // a cast with one scale a row
  kActivated,
  kActivatedBackward,
  kGated,
  kGatedBackward
};
enum Activation : int { kSilu, kGelu, kGeluTanh };

struct RowsParams {
  const void* x;         // [m, k], or gate and up beside each other: [m, 2 k]
  const void* dy;        // [m, k], for a backward pass
  const float* weights;  // [m] or null
  unsigned char* data;   // as x in a backward pass, otherwise [m, k]
  float* scale;          // [blocks of data's columns, m]; of whole rows, or given, [m]
  float* d_weights;      // [m, blocks], in a backward pass: sums over the columns of a block
  int m, k;
  int round_up;  // scales to powers of two
  Divisor by_blocks;

  constexpr int blocks() const { return ceil_div(k, kBlock); }  // of 128 columns
};

struct RowsConfig {
  int function;    // a Function
  int activation;  // an Activation; 0 for a cast
  int float32;     // operands are float32, otherwise bfloat16
  int e5m2;        // the result is float8_e5m2, otherwise float8_e4m3fn

  constexpr bool gated() const { return function == kGated || function == kGatedBackward; }
  constexpr bool activates() const { return function >= kActivated; }
  constexpr bool backward() const {
    return function == kActivatedBackward || function == kGatedBackward;
  }
  // Of each element of a block: x, or gate and up; and dy.
  constexpr int inputs() const { return 1 + gated() + backward(); }
  constexpr int outputs() const { return function == kGatedBackward ? 2 : 1; }

  constexpr long long bytes(const RowsParams& p) const {  // read and written, but for scales
    return (long long)p.m * p.k * ((float32 ? 4 : 2) * inputs() + outputs());
  }

  constexpr int threads() const { return 256; }
  static constexpr int kRowsPerWarp = 4;  // quantised at once
  // Of whole rows a thread has so many vectors of eight elements: of one row, or of several.
  static constexpr int kHeld = 8;
  constexpr int held_elements() const { return kHeld * threads() * 8; }
  constexpr int whole_rows(const RowsParams& p) const {  // of a CTA: 8, 4, 2 or 1
    int rows = kHeld;
    while (rows > 1 && rows * p.k > held_elements()) rows /= 2;
    return rows;
  }

  constexpr int ctas(const RowsParams& p) const {
    if (function == kWholeRows) return ceil_div(p.m, whole_rows(p));
    return ceil_div(ceil_div(p.m, kRowsPerWarp) * p.blocks(), threads() / 32);
  }
};

// What warps tell each other of the columns of so many tiles, elements of which have so many bytes:
// each warp's largest, and what is divided by.
constexpr int column_scales_bytes(int element, int tiles) {
  return tiles * kBlock * (256 / 32 * element + 4);
}

// What sm90_tiles.cuh quantises: with a scale for 128 rows of a column; for 128 x 128; x and its
// transposed, for 128 columns of a row and for 128 rows of a column; or both for 128 x 128.
enum Tiling : int { kPerChannel, kPerBlock, kBothWays, kPerBlockBothWays };

struct TilesParams {
  const void* x;           // [batch, m, k]
  const int* group_sizes;  // [batch, groups], or null: all rows are one group
  unsigned char* data;     // [batch, m, k]
  float* scale;            // row-major, but for kBothWays [batch, blocks of k, m]
  unsigned char* t_data;   // [batch, k, t_rows], the transposed
  float* t_scale;          // row-major, but for kBothWays [batch, t_rows / 128, k]
  int m, k, groups;
  int t_rows;  // rows of x as the transposed has them, with what fills up groups
  int round_up;
  TileGrid tiles;  // along t_rows and k
};

struct TilesConfig {
  int tiling;  // a Tiling
  int float32;
  int e5m2;

  constexpr long long bytes(const TilesParams& p) const {  // read and written, but for scales
    const int of_element = (float32 ? 4 : 2) + (tiling >= kBothWays ? 2 : 1);
    return (long long)p.tiles.batch * p.m * p.k * of_element;
  }

  constexpr int threads() const { return 256; }
  // What warps tell each other, and the tile on its way to the transposed.
  constexpr int smem_bytes() const {
    return column_scales_bytes(float32 ? 4 : 2, 1) + kBlock * kBlock;
  }
  // One for each tile, and one for each 128 rows of x, which may be of no group.
  constexpr int ctas(const TilesParams& p) const {
    return p.tiles.count() + (p.group_sizes ? p.tiles.batch * ceil_div(p.m, kBlock) : 0);
  }
};

}  // namespace deepgemm::quantize
