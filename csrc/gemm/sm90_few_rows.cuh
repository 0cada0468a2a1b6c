// D[M, N] (+)= sum over blocks kb of 128 along K:
//   a_scale[m, kb] * b_scale[n / 128, kb] * (A[m, kb] . B[n, kb])                 (FP8 operands)
//   A[m, kb] . B[n, kb]                                                      (bfloat16 operands)
//
// for an A of few rows, where the time is that of reading B once; K is contiguous in both. The
// product is B A^T: rows of B lie along the tensor core's side of 64, rows of A along the side that
// may be as short as 8.
//
//   copy thread   tiles of A and B   \                             consumer 0: 64 rows of B
//   scale warp    scales of A and B  / ring of `stages` slots      consumer 1: the next 64
//
//   full[s]:  the slot's bytes have landed.  empty[s]: every consumer has finished with the slot.
//
// The `split` CTAs of a cluster divide K. Each owns some of the tile's rows of A: the others send
// it their sums of these, and it adds them up, always in the same order, and stores them.
//
//   received:  all that this CTA was sent of a tile has landed.
//   taken:     the whole cluster has added up what it was sent, and may be sent the next tile's.
#pragma once

#include "device/numbers.cuh"
#include "device/scheduler.cuh"
#include "device/wgmma.cuh"
#include "gemm/config.h"

namespace deepgemm::gemm {

constexpr FewRows config{CONFIG};

constexpr int kBlockN = config.block_n();
constexpr int kChunks = config.block_m / 8;  // of eight rows of A: four registers a thread
constexpr int kOwned = config.owned();
constexpr bool kScaled = config.scales != kNoScales;
constexpr int kConsumerWarps = config.consumers * 4;  // that multiply

constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = consumer_registers(config.consumers, kProducerRegisters);
// Narrow tiles and single consumers get enough from the launch.
constexpr bool kMoveRegisters = config.consumers > 1 && config.block_m > 32;

using Out = OutType<config.out_float32>::type;

// Where things are in shared memory: slots of A, of B, sums from other CTAs, slots of scales,
// barriers. A position in the ring is a slot, and the parity of how often the ring has gone round.
struct Ring {
  uint32_t memory;
  int slot = 0;
  uint32_t parity = 0;

  static constexpr int kB = config.stages * config.a_bytes();
  static constexpr int kReceived = kB + config.stages * config.b_bytes();
  static constexpr int kD = kReceived + config.received_bytes();
  static constexpr int kScales = kD + config.d_bytes();
  static constexpr int kFull = kScales + config.stages * config.scale_bytes();
  static constexpr int kEmpty = kFull + config.stages * 8;

  uint32_t a() const { return memory + slot * config.a_bytes(); }
  uint32_t b() const { return memory + kB + slot * config.b_bytes(); }
  uint32_t a_scale() const { return memory + kScales + slot * config.scale_bytes(); }
  uint32_t b_scale() const { return a_scale() + config.block_m * 4; }
  uint32_t full() const { return memory + kFull + slot * 8; }
  uint32_t empty() const { return memory + kEmpty + slot * 8; }

  // Where a consumer stages the chunks that this CTA owns.
  uint32_t d(int consumer) const { return memory + kD + consumer * kOwned * 1024; }

  // A chunk that this CTA owns, from the CTA that is `distance` behind it in the cluster.
  uint32_t sums(int distance, int chunk) const {
    return memory + kReceived + ((distance - 1) * kOwned + chunk) * config.chunk_bytes();
  }
  uint32_t received() const { return memory + kEmpty + config.stages * 8; }
  uint32_t taken() const { return received() + 8; }

  __forceinline__ void advance() {
    if (++slot == config.stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The tiles of this cluster, one after the other.
struct Tiles {
  const Params& p;
  int index;
  int batch, m0, n0;  // the tile's first element

  __forceinline__ explicit Tiles(const Params& p) : p(p), index(blockIdx.x / config.split) {
    locate();
  }

  __forceinline__ void locate() {
    const Tile t = p.order(index);
    batch = t.batch;
    m0 = t.m * config.block_m;
    n0 = t.n * kBlockN;
  }

  // Rows from here on are not the tile's to write.
  __forceinline__ int m_end() const { return min(m0 + config.block_m, p.m); }

  __forceinline__ bool first() const { return index < gridDim.x / config.split; }
  __forceinline__ bool last() const { return index + gridDim.x / config.split >= p.order.count(); }
  __forceinline__ bool done() const { return index >= p.order.count(); }

  __forceinline__ void next() {
    index += gridDim.x / config.split;
    locate();
  }
};

// This CTA's share of K, in blocks.
struct Share {
  int first, end;

  __forceinline__ Share(const Params& p, int rank)
      : first(p.blocks_k * rank / config.split), end(p.blocks_k * (rank + 1) / config.split) {}
};

__forceinline__ void copy_tiles(const Params& p, Ring ring, Share share) {
  for (Tiles tile(p); !tile.done(); tile.next()) {
    // No box reaches beyond A or B: the copy engine takes longer to fill rows with zeros than to
    // load them.
    const int a_rows = min(p.m - tile.m0, config.block_m), b_rows = min(p.n - tile.n0, kBlockN);
    const TensorMap* a = a_rows == config.block_m ? &p.a : &p.a_edge;
    const TensorMap* b = b_rows == kBlockN ? &p.b : &p.b_edge;
    for (int kb = share.first; kb < share.end; ++kb, ring.advance()) {
      const int k = kb * config.block_k();
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_arrive_expect(ring.full(), (a_rows + b_rows) * kRowBytes);
      tma_load(ring.a(), a, ring.full(), k, tile.m0, tile.batch);
      tma_load(ring.b(), b, ring.full(), k, tile.n0, tile.batch, kEvictFirst);
    }
  }
}

// One float at a time, since no more is aligned if A has an odd number of rows. Rows past the last
// keep the slot's last scales: they are not stored.
__forceinline__ void copy_scales(const Params& p, Ring ring, Share share) {
  const int lane = threadIdx.x % 32;
  for (Tiles tile(p); !tile.done(); tile.next()) {
    const float* a = p.a_scale + static_cast<long long>(tile.batch) * p.blocks_k * p.m;
    const int block_n = min((tile.n0 + lane * 64) / 128, p.blocks_n - 1);
    const float* b =
        p.b_scale + static_cast<long long>(tile.batch * p.blocks_n + block_n) * p.blocks_k;
    for (int kb = share.first; kb < share.end; ++kb, ring.advance()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
#pragma unroll
      for (int i = lane; i < config.block_m; i += 32) {
        if (tile.m0 + i < p.m)
          copy_async(ring.a_scale() + i * 4, a + static_cast<long long>(kb) * p.m + tile.m0 + i);
      }
      if (lane < config.consumers) copy_async(ring.b_scale() + lane * 4, b + kb);
      barrier_arrive_after_copies(ring.full());
    }
  }
}

using Sum = float[4 * kChunks];  // of a consumer's thread

// A consumer's sums into rows `row` to `end` of D, in its 64 columns from `column` on. A thread has
// columns i and i + 8 of its warp's 16 in rows 2 q and 2 q + 1 of each chunk, where it is 4 i + q.
template <int count>
__forceinline__ void store(const Params& p, const Ring& ring, float (&sum)[count], int batch,
                           int row, int end, int column) {
  constexpr int chunks = count / 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, consumer = threadIdx.x / 128;
  Out* d = static_cast<Out*>(p.d) + static_cast<long long>(batch) * p.m * p.n;
  const bool vectors = config.d_bytes() > 0 && p.n % 8 == 0;  // rows are 16-byte aligned
  if (config.accumulate || !vectors) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int r = row + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int c = column + warp * 16 + lane / 4 + i % 4 / 2 * 8;
      if (r >= end || c >= p.n) continue;
      Out* to = d + static_cast<long long>(r) * p.n + c;
      if constexpr (config.out_float32) {
        *to = config.accumulate ? *to + sum[i] : sum[i];
      } else {
        if (config.accumulate) sum[i] += bfloat16_to_float(*to);
        if (!vectors) *to = pack_bfloat16(sum[i], 0);
      }
    }
  }
  if constexpr (config.d_bytes() > 0) {
    if (!vectors) return;
    const auto staged = [&](int r, int c) {  // 8 columns of a row, swizzled
      return ring.d(consumer) + r * 128 + (c ^ r % 8) * 16;
    };
    named_barrier(1 + consumer, 128);  // all have read the last tile
#pragma unroll
    for (int j = 0; j < chunks; j += 2) {  // two chunks, or one twice
      const int next = min(j + 1, chunks - 1);
      const float *x = &sum[4 * j], *y = &sum[4 * next];
      stmatrix_transposed(staged((lane < 16 ? j : next) * 8 + lane % 8, 2 * warp + lane / 8 % 2),
                          pack_bfloat16(x[0], x[1]), pack_bfloat16(x[2], x[3]),
                          pack_bfloat16(y[0], y[1]), pack_bfloat16(y[2], y[3]));
    }
    named_barrier(1 + consumer, 128);
#pragma unroll
    for (int i = threadIdx.x % 128; i < chunks * 64; i += 128) {
      const int r = i / 8, c = i % 8;
      if (row + r < end && column + c * 8 < p.n)
        store_result(d + static_cast<long long>(row + r) * p.n + column + c * 8,
                     load_shared_quad(staged(r, c)));
    }
  }
}

// Gives away the sums that other CTAs own, adds theirs to those that this one owns, and stores
// them.
__forceinline__ void reduce(const Params& p, const Ring& ring, const Tiles& tile, int rank,
                            uint32_t tile_parity, const Sum& sum, int column) {
  const int chunks = min(kOwned, kChunks - rank * kOwned);  // none if not positive
  if (threadIdx.x == 0 && chunks > 0)
    barrier_arrive_expect(ring.received(), (config.split - 1) * chunks * config.chunk_bytes());
  if (tile.first()) {
    cluster_wait();  // every CTA has set up its barriers
  } else {
    barrier_wait(ring.taken(), tile_parity ^ 1);
  }
  float own[4 * kOwned];
#pragma unroll
  for (int owner = 0; owner < config.split; ++owner) {
    const int distance = (rank - owner + config.split) % config.split;
    const uint32_t received = at_cta(ring.received(), owner);
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      if (owner * kOwned + j >= kChunks) break;
      const float* x = &sum[4 * (owner * kOwned + j)];
      if (owner == rank) {
#pragma unroll
        for (int i = 0; i < 4; ++i) own[4 * j + i] = x[i];
      } else {
        send(at_cta(ring.sums(distance, j), owner) + threadIdx.x * 16, received, x);
      }
    }
  }
  if (chunks > 0) {
    barrier_wait(ring.received(), tile_parity);
#pragma unroll
    for (int distance = 1; distance < config.split; ++distance) {
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        const uint4 x = load_shared_quad(ring.sums(distance, j) + threadIdx.x * 16);
        own[4 * j] += __uint_as_float(x.x);
        own[4 * j + 1] += __uint_as_float(x.y);
        own[4 * j + 2] += __uint_as_float(x.z);
        own[4 * j + 3] += __uint_as_float(x.w);
      }
    }
  }
  // Nobody waits for the last tile's, and the CTA that would be told may be gone.
  if (!tile.last() && threadIdx.x % 32 < config.split)
    barrier_arrive_at(at_cta(ring.taken(), threadIdx.x % 32));
  if (chunks > 0)
    store(p, ring, own, tile.batch, tile.m0 + rank * kOwned * 8, tile.m_end(), column);
}

// Whether a consumer's registers hold two products beside the sums.
constexpr bool kTwoProducts = config.block_m <= 64 || config.consumers <= 2;

// What one consumer makes of the slots.
struct Consumer {
  Ring next, ring;  // where the next product begins, and where the next one ends
  int number;

  // part (+)= B A^T, of a block of K.
  __forceinline__ void begin(Sum& part, bool add) {
    barrier_wait(next.full(), next.parity);
    const uint64_t b = tile_descriptor(next.b() + number * 64 * kRowBytes);
    const uint64_t a = tile_descriptor(next.a());
    pin(part);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kRowBytes / 32; ++k)
      wgmma<config.block_m, config.b_type, config.a_type>(part, b + 2 * k, a + 2 * k, add || k);
    wgmma_commit();
    next.advance();
  }

  // Gives the slot back.
  __forceinline__ void end() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty());
    ring.advance();
  }

  // The part is complete: sum += scales * part.
  __forceinline__ void promote(Sum& sum, Sum& part) {
    pin(part);
    const float b_scale = load_shared(ring.b_scale() + number * 4);
    float scale[2 * kChunks];
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const float2 pair = load_shared_pair(ring.a_scale() + (8 * j + threadIdx.x % 4 * 2) * 4);
      scale[2 * j] = pair.x;
      scale[2 * j + 1] = pair.y;
    }
    end();
#pragma unroll
    for (int i = 0; i < 4 * kChunks; ++i) sum[i] += scale[i / 4 * 2 + i % 2] * b_scale * part[i];
  }

  // While the tensor cores are at one product the one before is promoted.
  __forceinline__ void multiply_and_promote(Sum& sum, int blocks) {
    Sum parts[2];
    if (!kTwoProducts) {
#pragma unroll 1
      for (; blocks > 0; --blocks) {
        begin(parts[0], false);
        wgmma_wait<0>();
        promote(sum, parts[0]);
      }
    } else if (blocks > 0) {
      begin(parts[0], false);
#pragma unroll 1
      for (; blocks > 2; blocks -= 2) {
        begin(parts[1], false);
        wgmma_wait<1>();
        promote(sum, parts[0]);
        begin(parts[0], false);
        wgmma_wait<1>();
        promote(sum, parts[1]);
      }
      if (blocks == 2) {
        begin(parts[1], false);
        wgmma_wait<1>();
        promote(sum, parts[0]);
        wgmma_wait<0>();
        promote(sum, parts[1]);
      } else {
        wgmma_wait<0>();
        promote(sum, parts[0]);
      }
    }
  }

  // Of bfloat16: products add up in the tensor cores.
  __forceinline__ void multiply(Sum& sum, int blocks) {
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      begin(sum, true);
      wgmma_wait<1>();
      if (i > 0) end();
    }
    wgmma_wait<0>();
    pin(sum);
    if (blocks > 0) end();
  }
};

__forceinline__ void multiply(const Params& p, const Ring& ring, Share share, int rank,
                              int number) {
  Consumer consumer{ring, ring, number};
  uint32_t parity = 0;
  for (Tiles tile(p); !tile.done(); tile.next(), parity ^= 1) {
    Sum sum = {};
    if constexpr (kScaled) {
      consumer.multiply_and_promote(sum, share.end - share.first);
    } else {
      consumer.multiply(sum, share.end - share.first);
    }
    const int column = tile.n0 + number * 64;
    if constexpr (config.split == 1) {
      store(p, ring, sum, tile.batch, tile.m0, tile.m_end(), column);
    } else {
      reduce(p, ring, tile, rank, parity, sum, column);
    }
  }
}

extern "C" __global__ void __launch_bounds__(config.threads(), 1)
    kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char memory[];
  Ring ring{uniform(shared_address(memory))};
  const int warp = uniform(threadIdx.x / 32);

  if (warp == kConsumerWarps && elect_one()) {
    prefetch(&params.a);
    prefetch(&params.b);
    for (; ring.parity == 0; ring.advance()) {
      barrier_init(ring.full(), 1 + (kScaled ? 32 : 0));  // the copy thread, the scale warp's lanes
      barrier_init(ring.empty(), kConsumerWarps);
    }
    barrier_init(ring.received(), 1);
    barrier_init(ring.taken(), config.split * kConsumerWarps);
    ring.parity = 0;
    fence_barrier_init();
  }
  __syncthreads();
  if constexpr (config.split > 1) cluster_arrive();
  let_next_kernel_start();
  wait_for_previous_kernel();

  const int rank = config.split == 1 ? 0 : cluster_rank();
  const Share share(params, rank);
  if (warp < kConsumerWarps) {
    if constexpr (kMoveRegisters) grow_registers<kConsumerRegisters>();
    multiply(params, ring, share, rank, warp / 4);
  } else {
    if constexpr (kMoveRegisters) shrink_registers<kProducerRegisters>();
    if constexpr (config.split > 1) cluster_wait();
    if (warp == kConsumerWarps) {
      if (elect_one()) copy_tiles(params, ring, share);
    } else if (kScaled && warp == kConsumerWarps + 1) {
      copy_scales(params, ring, share);
    }
  }
}

}  // namespace deepgemm::gemm
