// What the training kernels are, of each of which there is one variant, and what the host hands to
// them.
#pragma once

#include "quantize/config.h"

namespace deepgemm::training {

using quantize::kBlock;

struct SwigluForwardParams {
  const void* h;         // bfloat16 [m, 2 k]: gate and up beside each other
  const float* weights;  // [m] or null
  unsigned char* y;      // [m, k]
  float* y_scale;        // [blocks, m]
  unsigned char* kept;   // h in FP8, [m, 2 k]
  float* kept_scale;     // [2 blocks, m]
  int m, k;
  Divisor by_blocks;

  constexpr int blocks() const { return k / kBlock; }  // of 128 columns
};

struct SwigluForward {
  using Params = SwigluForwardParams;
  static constexpr const char* kSource = "training/sm90_swiglu_forward.cuh";
  static constexpr int kRowsPerWarp = 8;

  constexpr long long bytes(const Params& p) const {  // read and written, but for scales
    return (long long)p.m * p.k * (2 * 2 + 1 + 2);
  }

  constexpr int threads() const { return 256; }
  constexpr int smem_bytes() const { return 0; }
  constexpr int ctas(const Params& p) const {
    return ceil_div(ceil_div(p.m, kRowsPerWarp) * p.blocks(), threads() / 32);
  }
};

struct SwigluBackwardParams {
  const unsigned char* h;  // [batch, m, 2 k]: gate and up beside each other
  const float* h_scale;    // [batch, blocks of 2 k, m]
  const void* dy;          // bfloat16 [batch, m, k]
  const int* group_sizes;  // [batch, groups]
  const float* weights;    // [batch, m] or null
  unsigned char* dh;       // [batch, m, 2 k]
  float* dh_scale;         // [batch, blocks of 2 k, m]
  unsigned char* t_dh;     // [batch, 2 k, t_rows], the transposed
  float* t_dh_scale;       // [batch, t_rows / 128, 2 k]
  unsigned char* t_y;      // [batch, k, t_rows]
  float* t_y_scale;        // [batch, t_rows / 128, k]
  float* d_weights;        // [batch, m, blocks of k]: sums over the columns of a block
  int m, k, groups;
  int t_rows;      // rows as the transposed have them, with what fills up groups
  TileGrid tiles;  // along t_rows and k
};

struct SwigluBackward {
  using Params = SwigluBackwardParams;
  static constexpr const char* kSource = "training/sm90_swiglu_backward.cuh";

  constexpr int threads() const { return 256; }
  // Two tiles in bfloat16, two in FP8 on their way to the transposed, and what warps tell each
  // other.
  constexpr int smem_bytes() const {
    return 2 * (2 + 1) * kBlock * kBlock + quantize::column_scales_bytes(2, 3);
  }
  // One for each tile, and one for each 128 rows, which may be of no group.
  constexpr int ctas(const Params& p) const {
    return p.tiles.count() + p.tiles.batch * ceil_div(p.m, kBlock);
  }
};

}  // namespace deepgemm::training
