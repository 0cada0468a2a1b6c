// D[M, N] (+)= sum over blocks kb of 128 along K:
//   a_scale[m, kb] * b_scale[n / 128, kb] * (A[m, kb] . B[n, kb])        (FP8 operands, K-major)
//
//   copy thread   tiles of A and B      \                         consumer 0: rows [0, kRows)
//   scale warps   products of scales    / ring of `stages` slots  consumer 1: the next kRows
//
//   full[s]:  the slot's bytes have landed.  empty[s]: every reader of the slot, in every CTA that
//   shares loads with this one, has finished.
//
// The tensor core keeps about 14 bits of a running sum, so each block's product is formed from zero
// in `part` and promoted with its scales into `sum`, in FP32. One consumer promotes while another
// one's product runs.
//
// Grid: one CTA a multiprocessor; each cluster walks tiles in TileOrder. The loads of the next tile
// begin while this one is being stored.
#pragma once

#include "device/ptx.cuh"
#include "device/scheduler.cuh"
#include "device/store.cuh"
#include "device/wgmma.cuh"
#include "gemm/config.h"

namespace deepgemm::gemm {

constexpr Config config{CONFIG};

constexpr int kRows = config.block_m / config.consumers;  // of D for each consumer
constexpr int kWaves = kRows / 64;  // products of 64 rows, one after the other
constexpr int kScalesPerRow = config.scales_per_row();
constexpr int kScaleWarps = 2;

// Registers move from the producer, which needs few, to the consumers; a launch gives each thread
// the same share of 65,536, in multiples of 8, and the shares cannot grow beyond what it gave.
constexpr int kLaunchRegisters = 65536 / config.threads() / 8 * 8;
constexpr int kProducerRegisters = config.consumers == 3 ? 32 : 40;
constexpr int kConsumerRegisters =
    (kLaunchRegisters + (kLaunchRegisters - kProducerRegisters) / config.consumers) / 8 * 8;
// One consumer gets enough from the launch.
constexpr bool kMoveRegisters = config.consumers > 1;

template <bool float32>
struct OutType {
  using type = float;
};
template <>
struct OutType<false> {
  using type = unsigned short;  // the bits of a bfloat16
};
using Out = OutType<config.out_float32>::type;

// Where things are in shared memory: slots of A, of B, D on its way out, slots of scales, barriers.
// A position in the ring is a slot, and the parity of how often the ring has gone round.
struct Ring {
  uint32_t memory;
  int slot = 0;
  uint32_t parity = 0;

  static constexpr int kB = config.stages * config.a_bytes();
  static constexpr int kD = kB + config.stages * config.b_bytes();
  static constexpr int kScales = kD + config.d_bytes();
  static constexpr int kFull = kScales + config.stages * config.scale_bytes();
  static constexpr int kEmpty = kFull + config.stages * 8;

  uint32_t a() const { return memory + slot * config.a_bytes(); }
  uint32_t b() const { return memory + kB + slot * config.b_bytes(); }
  uint32_t d() const { return memory + kD; }
  uint32_t scale(int row, int which) const {
    return memory + kScales + slot * config.scale_bytes() + (which * config.block_m + row) * 4;
  }
  uint32_t full() const { return memory + kFull + slot * 8; }
  uint32_t empty() const { return memory + kEmpty + slot * 8; }

  __forceinline__ void advance() {
    if (++slot == config.stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The tiles of this CTA, one after the other.
struct Tiles {
  const Params& p;
  int index;
  int m_rank, n_rank;  // this CTA's place in its cluster
  int batch, m0, n0;   // the tile's first element

  __forceinline__ explicit Tiles(const Params& p) : p(p), index(blockIdx.x / config.cluster()) {
    const int rank = config.cluster() == 1 ? 0 : cluster_rank();
    m_rank = rank % config.cluster_m;
    n_rank = rank / config.cluster_m;
    locate();
  }

  __forceinline__ void locate() {
    const Tile t = p.order(index);
    batch = t.batch;
    m0 = (t.m * config.cluster_m + m_rank) * config.block_m;
    n0 = (t.n * config.cluster_n + n_rank) * config.block_n;
  }

  __forceinline__ bool done() const { return index >= p.order.count(); }

  __forceinline__ void next() {
    index += gridDim.x / config.cluster();
    locate();
  }
};

__forceinline__ void copy_tiles(const Params& p, Ring ring) {
  Tiles tile(p);
  // CTAs that share a tile load one part each and broadcast it.
  const int a_part = tile.n_rank * (config.block_m / config.cluster_n);
  const int b_part = tile.m_rank * (config.block_n / config.cluster_m);
  unsigned short a_peers = 0, b_peers = 0;
  for (int i = 0; i < config.cluster_n; ++i) a_peers |= 1 << (tile.m_rank + i * config.cluster_m);
  for (int i = 0; i < config.cluster_m; ++i) b_peers |= 1 << (i + tile.n_rank * config.cluster_m);
  for (; !tile.done(); tile.next()) {
    for (int kb = 0; kb < p.blocks_k; ++kb, ring.advance()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_arrive_expect(ring.full(), config.a_bytes() + config.b_bytes());
      tma_load<config.cluster_n>(ring.a() + a_part * kBlockK, &p.a, ring.full(), kb * kBlockK,
                                 tile.m0 + a_part, tile.batch, a_peers);
      tma_load<config.cluster_m>(ring.b() + b_part * kBlockK, &p.b, ring.full(), kb * kBlockK,
                                 tile.n0 + b_part, tile.batch, b_peers);
    }
  }
}

// Multiplies the scales here, where nobody waits, so that a consumer has a single factor a row.
// Loads go out for two blocks at a time, or their latency would set the pace.
__forceinline__ void copy_scales(const Params& p, Ring ring, int warp) {
  constexpr int ahead = 2, rows = config.block_m / (32 * kScaleWarps);
  const int first_row = warp * 32 + threadIdx.x % 32;
  for (Tiles tile(p); !tile.done(); tile.next()) {
    const float* a_scale = p.a_scale + static_cast<long long>(tile.batch) * p.blocks_k * p.m;
    const int block_n = min(tile.n0 / 128, p.blocks_n - 1);
    const float* b_scale =
        p.b_scale + static_cast<long long>(tile.batch * p.blocks_n + block_n) * p.blocks_k;
    const int second = block_n + 1 < p.blocks_n ? p.blocks_k : 0;
    for (int kb = 0; kb < p.blocks_k; kb += ahead) {
      float a[ahead][rows], b[ahead][kScalesPerRow];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const int block = min(kb + i, p.blocks_k - 1);
#pragma unroll
        for (int j = 0; j < rows; ++j) {
          const int row = min(tile.m0 + first_row + j * 32 * kScaleWarps, p.m - 1);
          a[i][j] = __ldg(a_scale + static_cast<long long>(block) * p.m + row);
        }
        b[i][0] = __ldg(b_scale + block);
        if constexpr (kScalesPerRow == 2) b[i][1] = __ldg(b_scale + block + second);
      }
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (kb + i == p.blocks_k) break;
        barrier_wait(ring.empty(), ring.parity ^ 1);
#pragma unroll
        for (int j = 0; j < rows; ++j) {
#pragma unroll
          for (int k = 0; k < kScalesPerRow; ++k) {
            store_shared(ring.scale(first_row + j * 32 * kScaleWarps, k), a[i][j] * b[i][k]);
          }
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(ring.full());
        ring.advance();
      }
    }
  }
}

// sum += scale * part; `boundary` is the tile's first column that takes the second scale.
__forceinline__ void promote(float (&sum)[config.block_n / 2],
                             const float (&part)[config.block_n / 2],
                             const float (&scale)[2][kScalesPerRow], int boundary) {
  // Opaque, lest the comparisons below are made once for all blocks and kept in registers.
  if constexpr (kScalesPerRow == 2) asm volatile("" : "+r"(boundary));
#pragma unroll
  for (int i = 0; i < config.block_n / 2; ++i) {
    const float* s = scale[i / 2 % 2];  // of the upper or the lower row
    sum[i] += (kScalesPerRow == 2 && i / 4 * 8 >= boundary ? s[kScalesPerRow - 1] : s[0]) * part[i];
  }
}

// Each warp hands its own rows to the copy engine: nothing outside the warp waits.
__forceinline__ void store_staged(const Params& p, const float (&sum)[kWaves][config.block_n / 2],
                                  uint32_t shared, const Tiles& tile, int row) {
  constexpr int box = config.box_n();
  const bool leader = threadIdx.x % 32 == 0;
  if (leader) tma_store_wait_read();
  __syncwarp();
#pragma unroll
  for (int w = 0; w < kWaves; ++w) {
    const uint32_t rows = shared + (row + w * 64) * config.block_n * 2;
    stage_rows<box>(sum[w], rows);
    fence_shared_for_copy_engine();
    __syncwarp();
    if (leader) {
      for (int i = 0; i < config.block_n / box; ++i) {
        tma_store(&p.store, rows + i * 16 * box * 2, tile.n0 + i * box, tile.m0 + row + w * 64,
                  tile.batch);
      }
      tma_store_commit();
    }
  }
}

__forceinline__ void multiply(const Params& p, Ring ring, int consumer) {
  const int lane = threadIdx.x % 32;
  const int warp_row = consumer * kRows + threadIdx.x % 128 / 32 * 16;
  // What the next block's product needs is looked up before the previous one is promoted, off the
  // path from one product to the next.
  bool ready;
  uint64_t a, b;
  auto look_ahead = [&] {
    ready = barrier_test(ring.full(), ring.parity);
    a = tile_descriptor(ring.a() + consumer * kRows * kBlockK);
    b = tile_descriptor(ring.b());
  };
  look_ahead();

  for (Tiles tile(p); !tile.done(); tile.next()) {
    float sum[kWaves][config.block_n / 2] = {};
    float part[config.block_n / 2];
    const int boundary = 128 - tile.n0 % 128;
    for (int kb = 0; kb < p.blocks_k; ++kb) {
      if (!ready) barrier_wait(ring.full(), ring.parity);
#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
        pin(part);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kBlockK / 32; ++k) {
          wgmma<config.block_n>(part, a + w * (64 * kBlockK >> 4) + 2 * k, b + 2 * k, k);
        }
        wgmma_commit();
        float scale[2][kScalesPerRow];
#pragma unroll
        for (int i = 0; i < 2 * kScalesPerRow; ++i) {
          const int half = i / kScalesPerRow, which = i % kScalesPerRow;
          scale[half][which] =
              load_shared(ring.scale(warp_row + lane / 4 + w * 64 + half * 8, which));
        }
        wgmma_wait_all();
        pin(part);
        if (w == kWaves - 1) {
          if constexpr (config.cluster() == 1) {
            if (lane == 0) barrier_arrive(ring.empty());
          } else {
            if (lane < config.cluster()) barrier_arrive_at(ring.empty(), lane);
          }
          ring.advance();
          look_ahead();
        }
        promote(sum[w], part, scale, boundary);
      }
    }

    if (config.staged() && p.store_staged) {
      store_staged(p, sum, ring.d(), tile, warp_row);
    } else {
#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = tile.m0 + warp_row + lane / 4 + w * 64 + half * 8;
          Out* d = static_cast<Out*>(p.d) + (static_cast<long long>(tile.batch) * p.m + row) * p.n;
          store_row<config.accumulate>(sum[w], half, d, row < p.m, tile.n0, p.n);
        }
      }
    }
  }
  // Shared memory outlives what the copy engine still reads of it.
  if (lane == 0) tma_store_wait_read();
}

extern "C" __global__ void __launch_bounds__(config.threads(), 1)
    kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char memory[];
  Ring ring{uniform(shared_address(memory))};
  const int warp = uniform(threadIdx.x / 32);

  if (warp == 0 && elect_one()) {
    prefetch(&params.a);
    prefetch(&params.b);
    for (; ring.parity == 0; ring.advance()) {
      barrier_init(ring.full(), 1 + kScaleWarps);
      barrier_init(ring.empty(), config.cluster() * config.consumers * 4);  // each consumer warp
    }
    ring.parity = 0;
    fence_barrier_init();
  }
  if constexpr (config.cluster() > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  let_next_kernel_start();
  wait_for_previous_kernel();

  if (warp / 4 == config.consumers) {
    if constexpr (kMoveRegisters) shrink_registers<kProducerRegisters>();
    if (warp % 4 == 0) {
      if (elect_one()) copy_tiles(params, ring);
    } else if (warp % 4 <= kScaleWarps) {
      copy_scales(params, ring, warp % 4 - 1);
    }
  } else {
    if constexpr (kMoveRegisters) grow_registers<kConsumerRegisters>();
    multiply(params, ring, warp / 4);
  }

  // No CTA may leave while another one of its cluster still signals or writes into it.
  if constexpr (config.cluster() > 1) cluster_sync();
}

}  // namespace deepgemm::gemm
