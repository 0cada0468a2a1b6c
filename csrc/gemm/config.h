// What one compiled variant of the GEMM's kernels is, and what the host hands to it at launch.
#pragma once

#include "device/scheduler.cuh"
#include "device/types.h"

namespace deepgemm::gemm {

constexpr int kRowBytes = 128;  // of an operand's tile along its contiguous dim: a swizzled row
constexpr int kTileBytes = 32;  // that tell where a tile lies
constexpr int kStagedBytes = 1 << 16;  // of a tile of D in shared memory, at most
constexpr int kFactorBytes = 32;       // kChannels: a row's scale is 16 bfloat16 of an operand

enum Scales {
  kNoScales,  // D = A B^T
  kBlocks,    // one for each row of A and 128 of K, one for each 128 x 128 of B
  kChannels,  // one for each row of A and of B, and 128 of K
  kRows,      // one for each row of A and of B
};

enum Groups {
  kDense,       // D[i] = A[i] B[i]^T
  kContiguous,  // rows of A and D follow each other, each group's times its own B
  kMasked,      // the first rows of each A[i], times B[i]
  kAlongK,      // D[i] = A B^T over the i-th range of K
};

// How many arrays tell the groups: their starts and ends, or the id of each row's; their sizes.
constexpr int group_operands(int groups, bool by_id) {
  return groups == kDense ? 0 : groups == kMasked || by_id ? 1 : 2;
}

// Of sm90.cuh.
struct Config {
  int block_m;                 // rows of D per CTA: 64 or 128 for each consumer
  int block_n;                 // columns of D per CTA
  int stages;                  // depth of the ring between the copy engine and the tensor cores
  int consumers;               // warpgroups that multiply
  int cluster_m;               // CTAs along M that share one load of B
  int cluster_n;               // CTAs along N that share one load of A
  int out_float32;             // D is float32, otherwise bfloat16
  int accumulate;              // D += A B^T, otherwise D = A B^T
  int a_type, b_type;          // Element: both of 8 bits or both of 16
  int a_mn_major, b_mn_major;  // rows, not K, are contiguous: of bfloat16 alone
  int scales;                  // Scales
  int groups;                  // Groups

  constexpr int cluster() const { return cluster_m * cluster_n; }
  constexpr int threads() const { return (consumers + 1) * 128; }
  constexpr int element_bytes() const { return a_type == kBfloat16 ? 2 : 1; }
  constexpr int block_k() const { return kRowBytes / element_bytes(); }
  constexpr int a_bytes() const { return block_m * kRowBytes; }
  constexpr int b_bytes() const { return block_n * kRowBytes; }
  // A tile that is not aligned with B's blocks of 128 columns may touch two of them.
  constexpr int scales_per_row() const { return 128 % block_n == 0 ? 1 : 2; }
  constexpr int scale_bytes() const {
    return scales == kNoScales   ? 0
           : scales == kBlocks   ? block_m * scales_per_row() * 4
           : scales == kChannels ? (block_m + block_n) * kFactorBytes
                                 : (block_m + block_n) * 4;
  }
  // D leaves through shared memory and the copy engine, so that the next tile need not wait for it,
  // in boxes as wide as a swizzled row may be. Where a tile of float32 would take too much from the
  // ring, half of its columns follow the other half.
  constexpr int out_bytes() const { return out_float32 ? 4 : 2; }
  constexpr int parts() const { return block_m * block_n * out_bytes() > kStagedBytes ? 2 : 1; }
  constexpr int part_n() const { return block_n / parts(); }
  constexpr int d_bytes() const { return block_m * part_n() * out_bytes(); }
  constexpr int box_bytes() const {
    const int row = part_n() * out_bytes();
    return row % 128 == 0 ? 128 : row % 64 == 0 ? 64 : 32;
  }
  constexpr int box_n() const { return box_bytes() / out_bytes(); }
  // C may come through the ring, behind a tile's blocks, in the boxes in which D leaves. A slot has
  // as many of them as its parts for A and for B.
  constexpr int row_boxes() const { return block_m / 16; }
  constexpr int all_boxes() const { return row_boxes() * parts(); }
  constexpr int c_box_bytes() const { return 16 * part_n() * out_bytes(); }
  constexpr int c_boxes_in_a() const { return a_bytes() / c_box_bytes(); }
  constexpr int c_boxes() const { return c_boxes_in_a() + b_bytes() / c_box_bytes(); }
  constexpr int c_slots() const { return ceil_div(all_boxes(), c_boxes()); }
  // A dense tile may be done by so many CTAs, a consumer's rows each, where that many more have no
  // other tile.
  constexpr int slices() const {
    return groups == kDense && cluster_m == 1 && block_m == 64 * consumers ? consumers : 1;
  }
  // Of a box of A at the end of a group of rows, which the host does not know, or of a slice.
  constexpr int edge_rows() const {
    return groups == kContiguous || groups == kMasked ? block_m / cluster_n / 4
           : slices() > 1                             ? 32
                                                      : 0;
  }
  constexpr int stage_bytes() const { return a_bytes() + b_bytes() + scale_bytes(); }
  // What is told of so many tiles: of those that begin in the slots and the one that is being
  // stored.
  constexpr int tiles() const { return stages + 1; }
  constexpr int smem_bytes() const {
    return d_bytes() + stages * (stage_bytes() + 2 * static_cast<int>(sizeof(unsigned long long))) +
           tiles() * kTileBytes;
  }
};

// Of sm90_few_rows.cuh.
struct FewRows {
  int block_m;         // rows of A per tile: 8 to 128
  int consumers;       // warpgroups that multiply, 64 columns of D each
  int stages;          // depth of the ring between the copy engine and the tensor cores
  int split;           // CTAs of a cluster that divide K
  int out_float32;     // D is float32, otherwise bfloat16
  int accumulate;      // D += A B^T, otherwise D = A B^T
  int a_type, b_type;  // Element: both of 8 bits or both of 16
  int scales;          // kNoScales or kBlocks

  static constexpr int groups = kDense;

  constexpr int cluster() const { return split; }
  constexpr int threads() const { return (consumers + 1) * 128; }
  constexpr int element_bytes() const { return a_type == kBfloat16 ? 2 : 1; }
  constexpr int block_k() const { return kRowBytes / element_bytes(); }
  constexpr int block_n() const { return 64 * consumers; }
  constexpr int a_bytes() const { return block_m * kRowBytes; }
  constexpr int b_bytes() const { return block_n() * kRowBytes; }
  constexpr int scale_bytes() const {
    return scales == kNoScales ? 0 : (block_m + 4) * 4;  // B's: one for each consumer
  }
  // Sums travel between CTAs in chunks of eight rows of A. So many belong to one CTA, which adds
  // them up and stores them.
  constexpr int owned() const { return ceil_div(block_m / 8, split); }
  constexpr int chunk_bytes() const { return 8 * block_n() * 4; }
  constexpr int received_bytes() const { return (split - 1) * owned() * chunk_bytes(); }
  // A bfloat16 D is transposed in shared memory, unless a thread has but a few elements of it.
  constexpr int d_bytes() const {
    return out_float32 || block_m == 8 ? 0 : owned() * 8 * block_n() * 2;
  }
  constexpr int stage_bytes() const { return a_bytes() + b_bytes() + scale_bytes(); }
  constexpr int smem_bytes() const {
    return received_bytes() + d_bytes() + stages * (stage_bytes() + 16) + 16;
  }
};

// Rows (kContiguous) or elements along K (kAlongK) of one group.
struct alignas(16) Span {
  int start, end;
  int group;  // negative: of none, whose rows of D are zero
  int unused;
};

// Of runs.cuh, which finds the spans of rows: one cluster.
constexpr int kRunsCtas = 8, kRunsThreads = 256, kRunsWarps = kRunsCtas * kRunsThreads / 32;
constexpr int kToldBytes = 16;  // that a CTA is told by each warp, and of a barrier
constexpr int kRunsSharedBytes = 2 * (1 + kRunsWarps) * kToldBytes;

struct Params {
  TensorMap a, b;
  TensorMap a_edge, b_edge;  // in boxes of what is left over of whole ones, A's or of edge_rows()
  TensorMap store;           // sm90.cuh: D in boxes of a warp's 16 rows, if `copy_engine`
  const float* a_scale;      // kBlocks, kChannels: [batch, ceil(k / 128), m]. kRows: [batch, m]
  const float* b_scale;      // kBlocks: [batch, ceil(n / 128), ceil(k / 128)]. Others as A's, of n
  void* d;                   // [batch, m, n]
  const Span* spans;         // kContiguous by id: see runs.cuh; null: by starts and ends
  const int* sizes;          // kMasked: the rows of each group
  const int *starts, *ends;  // of each group, its rows, or kAlongK along K
  int num_groups;
  int m, n, k;
  int copy_engine;         // may write D: its rows are a multiple of box_n
  int keep_d;              // D, which the next kernel reads, leaves L2 after anything else
  int leave_first;         // B's tiles that are read once leave L2 before anything else
  int blocks_n, blocks_k;  // blocks of 128 or block_k, the last one perhaps partial
  TileOrder order;         // over clusters' tiles, of one group if there are groups
  int first_slice;         // kDense: in that order, tiles from here on are done in slices

  // Whether what is left of A at its end, or at a group's, comes in boxes of edge_rows().
  constexpr bool a_edge_in_boxes(const Config& config) const {
    return config.edge_rows() && (config.groups != kDense || first_slice < order.count());
  }
};

}  // namespace deepgemm::gemm
