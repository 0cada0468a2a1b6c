// From operands in memory to a launch of the GEMM.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gemm/config.h"
#include "jit/tensor_map.h"

namespace deepgemm::gemm {

inline jit::CUtensorMapDataType element_type(uint64_t bytes) {
  return bytes == 1   ? jit::CU_TENSOR_MAP_DATA_TYPE_UINT8
         : bytes == 2 ? jit::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                      : jit::CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

// [batch, rows, columns], row after row.
struct Matrix {
  void* data;
  uint64_t batch, rows, columns;

  uint64_t count() const { return batch * rows * columns; }

  // Boxes of elements of `bytes` bytes, in rows of kRowBytes.
  TensorMap map(uint64_t bytes, uint32_t box_columns, uint32_t box_rows) const {
    return jit::tensor_map(data, element_type(bytes), {columns, rows, batch},
                           {columns * bytes, columns * rows * bytes}, {box_columns, box_rows, 1},
                           jit::CU_TENSOR_MAP_SWIZZLE_128B);
  }
};

// A null pointer is what the config has no use for.
struct Operands {
  Matrix a, b, d;
  const float *a_scale, *b_scale;
  const int* groups[2];  // see Groups
  Span* spans;           // kContiguous by id: where they are to be found, otherwise null
};

struct Plan {
  Params params;
  int clusters;
};

// Rows of the last box, of so many each.
inline int left_over(uint64_t rows, int box) { return (rows - 1) % box + 1; }

// D as [batch, columns / box_n, rows, box_n]: what a warp has staged, box after box, is one box.
inline TensorMap store_map(const Config& config, const Matrix& d) {
  const uint64_t row = d.columns * config.out_bytes();
  const uint32_t box_n = config.box_n();
  return jit::tensor_map(d.data, element_type(config.out_bytes()),
                         {box_n, d.rows, d.columns / box_n, d.batch},
                         {row, box_n * uint64_t(config.out_bytes()), d.rows * row},
                         {box_n, 16, config.part_n() / box_n, 1},
                         config.box_bytes() == 128  ? jit::CU_TENSOR_MAP_SWIZZLE_128B
                         : config.box_bytes() == 64 ? jit::CU_TENSOR_MAP_SWIZZLE_64B
                                                    : jit::CU_TENSOR_MAP_SWIZZLE_32B);
}

inline Plan plan(const Config& config, int num_sms, const Operands& x) {
  const auto operand = [&](const Matrix& matrix, bool mn_major, int rows) {
    return matrix.map(config.element_bytes(), kRowBytes / config.element_bytes(),
                      mn_major ? config.block_k() : rows);
  };
  Params p = {};
  const int a_rows = config.block_m / config.cluster_n, b_rows = config.block_n / config.cluster_m;
  p.a = operand(x.a, config.a_mn_major, a_rows);
  p.b = operand(x.b, config.b_mn_major, b_rows);
  const bool contiguous = config.groups == kContiguous;
  p.b_edge = operand(x.b, config.b_mn_major, left_over(x.d.columns, b_rows));
  // Of masked groups few rows are written, whatever the room for them.
  p.keep_d = config.groups == kMasked || l2_may_hold(x.d.count() * config.out_bytes());
  p.leave_first = l2_may_hold(x.b.count() * config.element_bytes());
  p.copy_engine = x.d.columns % config.box_n() == 0;
  if (p.copy_engine) p.store = store_map(config, x.d);
  p.a_scale = x.a_scale;
  p.b_scale = x.b_scale;
  p.d = x.d.data;
  p.m = x.d.rows;
  p.n = x.d.columns;
  p.k = config.a_mn_major ? x.a.rows : x.a.columns;
  p.blocks_n = ceil_div(p.n, 128);
  p.blocks_k = ceil_div(p.k, config.block_k());
  p.spans = x.spans;
  p.sizes = p.starts = x.groups[0];
  p.ends = x.groups[1];
  p.num_groups = contiguous ? x.b.batch : x.d.batch;

  // Of one group the rows are not known here, but there are no more than all.
  const int rows = ceil_div(p.m, config.block_m * config.cluster_m);
  const int columns = ceil_div(p.n, config.block_n * config.cluster_n);
  const int64_t tiles =
      int64_t{columns} * (contiguous ? rows + p.num_groups : int64_t{rows} * p.num_groups);
  int clusters = std::min<int64_t>(num_sms / config.cluster(), tiles), in_slices = 0;
  if (config.groups == kDense) {
    // The last round in slices, if that gives no cluster two of them; otherwise no more clusters
    // than it takes for as many rounds, which leaves the others more of the power.
    const int count = tiles, last_round = count % clusters;
    if (config.slices() > 1 && last_round * config.slices() <= clusters) {
      in_slices = last_round;
    } else {
      clusters = ceil_div(count, ceil_div(count, clusters));
    }
  }
  // The tiles that run at once should cover a square of D, counted by what CTAs load: those that
  // share a tile load a part each.
  const double wide = config.block_n * config.cluster_n / config.cluster_m;
  const double high = config.block_m * config.cluster_m / config.cluster_n;
  const int band = std::lround(std::sqrt(clusters * wide / high));
  p.order = TileOrder::of(rows, columns, config.groups == kDense ? p.num_groups : 1,
                          std::clamp(band, 1, rows));
  p.first_slice = p.order.count() - in_slices;
  p.a_edge = operand(x.a, config.a_mn_major,
                     p.a_edge_in_boxes(config) ? config.edge_rows() : left_over(x.d.rows, a_rows));
  return {p, clusters};
}

inline Plan plan(const FewRows& config, int num_sms, const Operands& x) {
  const auto operand = [&](const Matrix& matrix, int rows) {
    return matrix.map(config.element_bytes(), config.block_k(), rows);
  };
  Params p = {};
  p.a = operand(x.a, config.block_m);
  p.b = operand(x.b, config.block_n());
  p.a_edge = operand(x.a, left_over(x.d.rows, config.block_m));
  p.b_edge = operand(x.b, left_over(x.d.columns, config.block_n()));
  p.a_scale = x.a_scale;
  p.b_scale = x.b_scale;
  p.d = x.d.data;
  p.m = x.d.rows;
  p.n = x.d.columns;
  p.k = x.a.columns;
  p.blocks_n = ceil_div(p.n, 128);
  p.blocks_k = ceil_div(p.k, config.block_k());
  const int rows = ceil_div(p.m, config.block_m), columns = ceil_div(p.n, config.block_n());
  // Tiles of the same rows of B come one after the other.
  p.order = TileOrder::of(rows, columns, x.d.batch, rows);
  return {p, std::min(num_sms / config.split, p.order.count())};
}

}  // namespace deepgemm::gemm
