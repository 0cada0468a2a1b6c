// What the compiled variants of the quantising kernels are, and what the host hands to them.
#pragma once

#include "device/types.h"

namespace deepgemm::quantize {

constexpr int kBlock = 128;  // elements along a dim that share a scale

// What sm90_rows.cuh quantises.
enum Function : int { kCast, kGated, kGatedBackward };
enum Activation : int { kSilu, kGelu, kGeluTanh };

struct RowsParams {
  const void* x;         // [m, k], or gate and up beside each other: [m, 2 k]
  const void* dy;        // [m, k], for the backward pass
  const float* weights;  // [m] or null
  unsigned char* data;   // as x in the backward pass, otherwise [m, k]
  float* scale;          // [blocks of data's columns, m]
  float* d_weights;      // [m, blocks], in the backward pass: sums over the columns of a block
  int m, k;
  int round_up;  // scales to powers of two

  constexpr int blocks() const { return ceil_div(k, kBlock); }  // of 128 columns
};

struct RowsConfig {
  int function;    // a Function
  int activation;  // an Activation; 0 for a cast
  int float32;     // operands are float32, otherwise bfloat16
  int e5m2;        // the result is float8_e5m2, otherwise float8_e4m3fn

  constexpr int threads() const { return 256; }
  // That a warp quantises at once. Of each, the backward pass has three inputs and two results.
  constexpr int rows_per_warp() const { return function == kGatedBackward ? 4 : 8; }
  constexpr int ctas(const RowsParams& p) const {
    return ceil_div(ceil_div(p.m, rows_per_warp()) * p.blocks(), threads() / 32);
  }
};

// What sm90_tiles.cuh quantises: with a scale for 128 rows of a column; for 128 x 128; x and its
// transposed, for 128 columns of a row and for 128 rows of a column; or both for 128 x 128.
enum Tiling : int { kPerChannel, kPerBlock, kBothWays, kPerBlockBothWays };

struct TilesParams {
  const void* x;           // [batch, m, k]
  const int* group_sizes;  // [batch, groups], or null: all rows are one group
  unsigned char* data;     // [batch, m, k]
  float* scale;            // row-major, but for kBothWays [batch, blocks of k, m]
  unsigned char* t_data;   // [batch, k, t_rows], the transposed
  float* t_scale;          // [batch, t_rows / 128, k], for kBothWays
  int batch, m, k, groups;
  int t_rows;  // rows of x as the transposed has them, with what fills up groups
  int round_up;

  constexpr int tiles_m() const { return ceil_div(t_rows, kBlock); }
  constexpr int tiles_k() const { return ceil_div(k, kBlock); }
  constexpr int tiles() const { return batch * tiles_m() * tiles_k(); }
};

struct TilesConfig {
  int tiling;  // a Tiling
  int float32;
  int e5m2;

  constexpr int threads() const { return 128; }
  // What warps tell each other of columns, and the tile on its way to the transposed.
  constexpr int smem_bytes() const { return (threads() / 32 + 1) * kBlock * 4 + kBlock * kBlock; }
  // One for each tile, and one for each 128 rows of x, which may be of no group.
  constexpr int ctas(const TilesParams& p) const {
    return p.tiles() + (p.group_sizes ? p.batch * ceil_div(p.m, kBlock) : 0);
  }
};

}  // namespace deepgemm::quantize
