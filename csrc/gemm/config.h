// What one compiled variant of the dense GEMM is, and what the host hands to it at launch.
#pragma once

#include "device/scheduler.cuh"
#include "device/types.h"

namespace deepgemm::gemm {

constexpr int kBlockK = 128;  // one swizzled row of shared memory, and the depth of one scale

struct Config {
  int block_m;      // rows of D per CTA: 64 or 128 for each consumer
  int block_n;      // columns of D per CTA
  int stages;       // depth of the ring between the copy engine and the tensor cores
  int consumers;    // warpgroups that multiply
  int cluster_m;    // CTAs along M that share one load of B
  int cluster_n;    // CTAs along N that share one load of A
  int out_float32;  // D is float32, otherwise bfloat16
  int accumulate;   // D += A B^T, otherwise D = A B^T

  constexpr int cluster() const { return cluster_m * cluster_n; }
  constexpr int threads() const { return (consumers + 1) * 128; }
  constexpr int a_bytes() const { return block_m * kBlockK; }
  constexpr int b_bytes() const { return block_n * kBlockK; }
  // A tile that is not aligned with B's blocks of 128 columns may touch two of them.
  constexpr int scales_per_row() const { return 128 % block_n == 0 ? 1 : 2; }
  constexpr int scale_bytes() const { return block_m * scales_per_row() * 4; }
  // A bfloat16 D leaves through shared memory and the copy engine, so that the next tile need not
  // wait for it, in boxes as wide as a swizzled row may be.
  constexpr bool staged() const { return !out_float32 && !accumulate; }
  constexpr int d_bytes() const { return staged() ? block_m * block_n * 2 : 0; }
  constexpr int box_n() const { return block_n % 64 == 0 ? 64 : block_n % 32 == 0 ? 32 : 16; }
  constexpr int stage_bytes() const { return a_bytes() + b_bytes() + scale_bytes(); }
  constexpr int smem_bytes() const {
    return d_bytes() + stages * (stage_bytes() + 2 * static_cast<int>(sizeof(unsigned long long)));
  }
};

struct Params {
  TensorMap a, b;
  TensorMap store;       // D in boxes of 16 rows, if `store_staged`
  const float* a_scale;  // [batch, ceil(k / 128), m]: m fastest
  const float* b_scale;  // [batch, ceil(n / 128), ceil(k / 128)]
  void* d;               // [batch, m, n]
  int m, n;
  int store_staged;        // D's rows are 16-byte aligned, as the copy engine needs
  int blocks_n, blocks_k;  // blocks of 128 with a scale of their own, the last one perhaps partial
  TileOrder order;         // over clusters' tiles
};

}  // namespace deepgemm::gemm
