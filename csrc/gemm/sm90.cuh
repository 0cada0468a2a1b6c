// D[M, N] (+)= sum over blocks kb of 128 along K:
//   a_scale[m, kb] * b_scale[n / 128, kb] * (A[m, kb] . B[n, kb])        (kBlocks; see Scales)
// for one problem, for a batch, or for groups that are found on the device (see Groups).
//
//   copy thread   tiles of A and B      \                         consumer 0: the first rows
//   scale warps   their scales          / ring of `stages` slots  consumer 1: the next ones
//
//   full[s]:  the slot's bytes have landed.  empty[s]: every reader of the slot, in every CTA that
//   shares loads with this one, has finished.
//
// The tensor core keeps about 14 bits of a running sum of FP8. So a product of FP8 is formed from
// zero in `part` (multiply_and_promote), for one block of 128 or, without scales for each block,
// for four, and then promoted with its scales into `sum`, in FP32. One consumer promotes while
// another one's product runs. Products of bfloat16 add up in `sum` (multiply).
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

constexpr int kWaveRows = 64;  // of one product
constexpr int kConsumerRows = config.block_m / config.consumers;
constexpr int kWaves = kConsumerRows / kWaveRows;  // products, one after the other
constexpr int kScalesPerRow = config.scales_per_row();
constexpr int kScaleWarps = config.scale_bytes() ? 2 : 0;

// Registers move from the producer, which needs few, to the consumers; a launch gives each thread
// the same share of 65,536, in multiples of 8, and the shares cannot grow beyond what it gave.
constexpr int kLaunchRegisters = 65536 / config.threads() / 8 * 8;
// Finding groups, or a scale for each column, takes more of them.
constexpr bool kMoreRegisters = config.scales == kChannels || config.groups != kDense;
constexpr int kProducerRegisters = config.consumers == 2 ? 40 : kMoreRegisters ? 56 : 32;
constexpr int kConsumerRegisters =
    (kLaunchRegisters + (kLaunchRegisters - kProducerRegisters) / config.consumers) / 8 * 8;
// One consumer gets enough from the launch.
constexpr bool kMoveRegisters = config.consumers > 1;

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
  // kBlocks: of a row, with the first or second block of columns. Others: of A's rows, then B's.
  uint32_t scale(int row, int which = 0) const {
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
  int index;           // among the clusters' tiles, of the group if there are groups
  int number = 0;      // of the group
  int m_rank, n_rank;  // this CTA's place in its cluster
  int m0, n0;          // the tile's first element
  int m_end;           // first row that is not the tile's to write
  int k0, k_end;       // elements along K
  int a_batch, b_batch, d_batch;
  bool done;

  __forceinline__ explicit Tiles(const Params& p) : p(p), index(blockIdx.x / config.cluster()) {
    const int rank = config.cluster() == 1 ? 0 : cluster_rank();
    m_rank = rank % config.cluster_m;
    n_rank = rank / config.cluster_m;
    locate();
  }

  __forceinline__ void locate() {
    k0 = 0;
    k_end = p.k;
    m_end = p.m;
    TileOrder order = p.order;
    if constexpr (config.groups == kDense) {
      done = index >= order.count();
      const Tile t = order(index);
      a_batch = b_batch = d_batch = t.batch;
      place(0, t);
    } else {
      Span span;
      for (;; index -= order.count(), ++number) {
        done = !next_span(span);
        if (done) return;
        if constexpr (config.groups != kAlongK) {
          order.rows = ceil_div(span.end - span.start, config.block_m * config.cluster_m);
        }
        if (index < order.count()) break;
      }
      if constexpr (config.groups == kAlongK) {
        k0 = span.start;
        k_end = span.end;
        span.start = 0;
      } else if constexpr (config.groups == kContiguous) {
        m_end = span.end;
        if (span.group < 0) k_end = 0;
      }
      a_batch = config.groups == kMasked ? number : 0;
      b_batch = config.groups == kAlongK ? 0 : span.group;
      d_batch = config.groups == kContiguous ? 0 : number;
      place(span.start, order(index));
    }
  }

  __forceinline__ bool next_span(Span& span) const {
    if constexpr (config.groups == kContiguous) {
      const int4 x = __ldg(reinterpret_cast<const int4*>(p.spans) + number);
      span = {x.x, x.y, x.z};
      return span.start < p.m;
    } else {
      if (number == p.num_groups) return false;
      if constexpr (config.groups == kMasked) {
        span = {0, min(__ldg(p.sizes + number), p.m), number};
      } else {
        span.start = max(__ldg(p.starts + number), 0);
        span.end = max(min(__ldg(p.ends + number), p.k), span.start);
        span.group = number;
      }
      return true;
    }
  }

  __forceinline__ void place(int first_row, Tile t) {
    m0 = first_row + (t.m * config.cluster_m + m_rank) * config.block_m;
    n0 = (t.n * config.cluster_n + n_rank) * config.block_n;
  }

  __forceinline__ void next() {
    index += gridDim.x / config.cluster();
    locate();
  }

  // Blocks of K, counted from K's beginning wherever the group's is.
  __forceinline__ int first_block() const { return k0 / config.block_k(); }
  __forceinline__ int last_block() const {
    return k_end > k0 ? ceil_div(k_end, config.block_k()) : first_block();
  }
};

// Rows `row` on of an operand, a block along K.
template <bool mn_major, int rows, int peers>
__forceinline__ void load(uint32_t shared, const TensorMap& map, uint32_t barrier, int kb, int row,
                          int batch, unsigned short peer_mask) {
  const int k = kb * config.block_k();
  if constexpr (mn_major) {
    constexpr int box = kRowBytes / config.element_bytes();
#pragma unroll
    for (int i = 0; i < rows; i += box) {
      tma_load<peers>(shared + i * kRowBytes, &map, barrier, row + i, k, batch, peer_mask);
    }
  } else {
    tma_load<peers>(shared, &map, barrier, k, row, batch, peer_mask);
  }
}

__forceinline__ void copy_tiles(const Params& p, Ring ring) {
  Tiles tile(p);
  // CTAs that share a tile load one part each and broadcast it.
  constexpr int a_rows = config.block_m / config.cluster_n;
  constexpr int b_rows = config.block_n / config.cluster_m;
  const int a_part = tile.n_rank * a_rows, b_part = tile.m_rank * b_rows;
  unsigned short a_peers = 0, b_peers = 0;
  for (int i = 0; i < config.cluster_n; ++i) a_peers |= 1 << (tile.m_rank + i * config.cluster_m);
  for (int i = 0; i < config.cluster_m; ++i) b_peers |= 1 << (i + tile.n_rank * config.cluster_m);
  for (; !tile.done; tile.next()) {
    const int last_block = tile.last_block();
    for (int kb = tile.first_block(); kb < last_block; ++kb, ring.advance()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_arrive_expect(ring.full(), config.a_bytes() + config.b_bytes());
      load<config.a_mn_major, a_rows, config.cluster_n>(ring.a() + a_part * kRowBytes, p.a,
                                                        ring.full(), kb, tile.m0 + a_part,
                                                        tile.a_batch, a_peers);
      load<config.b_mn_major, b_rows, config.cluster_m>(ring.b() + b_part * kRowBytes, p.b,
                                                        ring.full(), kb, tile.n0 + b_part,
                                                        tile.b_batch, b_peers);
    }
  }
}

// What one lane of the scale warps brings of each block of K.
struct LaneScales {
  static constexpr int kStride = 32 * (kScaleWarps ? kScaleWarps : 1);
  static constexpr int kA = config.block_m / kStride;
  static constexpr int kB = config.scales == kBlocks ? kScalesPerRow : config.block_n / kStride;

  const Params& p;
  const float *a, *b;  // the lane's first scale of A and of B, in the first block of K
  int a_rows, b_rows;  // how many rows there are from there on
  int last_block;

  struct Block {
    float a[kA], b[kB];
  };

  __forceinline__ LaneScales(const Params& p, const Tiles& tile, int lane)
      : p(p), last_block(tile.last_block() - 1) {
    const long long blocks_k = config.scales == kRows ? 1 : p.blocks_k;
    a = p.a_scale + tile.a_batch * blocks_k * p.m + tile.m0 + lane;
    a_rows = p.m - tile.m0 - lane;
    if constexpr (config.scales == kBlocks) {
      const int block = min(tile.n0 / 128, p.blocks_n - 1);
      b = p.b_scale + (tile.b_batch * p.blocks_n + block) * blocks_k;
      b_rows = p.blocks_n - block;
    } else {
      b = p.b_scale + tile.b_batch * blocks_k * p.n + tile.n0 + lane;
      b_rows = p.n - tile.n0 - lane;
    }
  }

  __forceinline__ void load(Block& x, int kb) const {
    kb = config.scales == kRows ? 0 : min(kb, last_block);
    const float* a_block = a + static_cast<long long>(kb) * p.m;
#pragma unroll
    for (int j = 0; j < kA; ++j) x.a[j] = j * kStride < a_rows ? __ldg(a_block + j * kStride) : 0;
    if constexpr (config.scales == kBlocks) {
#pragma unroll
      for (int j = 0; j < kB; ++j) x.b[j] = __ldg(b + (j < b_rows ? j * p.blocks_k : 0) + kb);
    } else {
      const float* b_block = b + static_cast<long long>(kb) * p.n;
#pragma unroll
      for (int j = 0; j < kB; ++j) x.b[j] = j * kStride < b_rows ? __ldg(b_block + j * kStride) : 0;
    }
  }

  // Multiplies, if it can, where nobody waits: then a consumer has a single factor a row.
  static __forceinline__ void store(const Block& x, const Ring& ring, int lane) {
#pragma unroll
    for (int j = 0; j < kA; ++j) {
      const int row = lane + j * kStride;
      if constexpr (config.scales == kBlocks) {
#pragma unroll
        for (int i = 0; i < kB; ++i) store_shared(ring.scale(row, i), x.a[j] * x.b[i]);
      } else {
        store_shared(ring.scale(row), x.a[j]);
      }
    }
    if constexpr (config.scales != kBlocks) {
#pragma unroll
      for (int j = 0; j < kB; ++j) store_shared(ring.scale(lane + j * kStride, 1), x.b[j]);
    }
  }
};

__forceinline__ void copy_scales(const Params& p, Ring ring, int lane) {
  // So many blocks' loads are in flight, or their latency would set the pace.
  constexpr int ahead = config.scales == kBlocks ? 4 : config.scales == kChannels ? 2 : 1;
  for (Tiles tile(p); !tile.done; tile.next()) {
    const LaneScales scales(p, tile, lane);
    const int first_block = tile.first_block(), last_block = tile.last_block();
    if (first_block == last_block) continue;
    LaneScales::Block blocks[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) scales.load(blocks[i], first_block + i);
    for (int kb = first_block; kb < last_block; kb += ahead) {
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (kb + i == last_block) break;
        barrier_wait(ring.empty(), ring.parity ^ 1);
        scales.store(blocks[i], ring, lane);
        if (config.scales != kRows) scales.load(blocks[i], kb + i + ahead);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(ring.full());
        ring.advance();
      }
    }
  }
}

// Where a scale is one for all of K, this many blocks' products are promoted as one.
constexpr int kPromoteBlocks = config.scales == kRows ? 4 : 1;
static_assert(kPromoteBlocks == 1 || kWaves == 1);

using Sum = float[kWaves][config.block_n / 2];
using Part = float[config.block_n / 2];

// One consumer's view of the ring.
struct Reader {
  Ring ring;
  int first_row;  // of this consumer in the tile
  bool ready;
  uint64_t a, b;

  // What the next block's product needs is looked up before the previous one is promoted, off the
  // path from one product to the next.
  __forceinline__ void look_ahead() {
    constexpr int box = kRowBytes * config.block_k();
    ready = barrier_test(ring.full(), ring.parity);
    a = tile_descriptor(ring.a() + first_row * kRowBytes, config.a_mn_major ? box : 0);
    b = tile_descriptor(ring.b(), config.b_mn_major ? box : 0);
  }

  __forceinline__ void wait() {
    if (!ready) barrier_wait(ring.full(), ring.parity);
  }

  __forceinline__ void advance() {
    ring.advance();
    look_ahead();
  }

  // Starts one block's product of a wave's rows.
  __forceinline__ void product(float (&d)[config.block_n / 2], int wave, bool accumulate) const {
    constexpr int a_step = config.a_mn_major ? 128 : 2, b_step = config.b_mn_major ? 128 : 2;
    const uint64_t rows = a + wave * (kWaveRows * kRowBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kRowBytes / 32; ++k) {
      wgmma<config.block_n, config.a_type, config.b_type, config.a_mn_major, config.b_mn_major>(
          d, rows + a_step * k, b + b_step * k, accumulate || k);
    }
    wgmma_commit();
  }
};

__forceinline__ void release(const Ring& slot) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if constexpr (config.cluster() == 1) {
    if (lane == 0) barrier_arrive(slot.empty());
  } else {
    if (lane < config.cluster()) barrier_arrive_at(slot.empty(), lane);
  }
}

// Zeroes what lies outside the group's range of K in the slot of block kb.
__forceinline__ void cut(const Ring& ring, const Tiles& tile, int kb) {
  const int first = max(tile.k0 - kb * config.block_k(), 0);
  const int end = min(tile.k_end - kb * config.block_k(), config.block_k());
  if (first == 0 && end == config.block_k()) return;
  const auto cut_operand = [&](uint32_t shared, int rows, bool mn_major) {
    for (int i = threadIdx.x; i < rows * (kRowBytes / 4); i += config.consumers * 128) {
      const int row = i / (kRowBytes / 4), word = i % (kRowBytes / 4);
      uint32_t keep = 0;
      if (mn_major) {
        const int k = row % config.block_k();
        if (k >= first && k < end) continue;
      } else {
        for (int byte = 0; byte < 4; ++byte) {
          const int k = (word * 4 + byte) / config.element_bytes();
          if (k >= first && k < end) keep |= 0xffu << 8 * byte;
        }
        if (keep == 0xffffffff) continue;
      }
      const uint32_t at = shared + row * kRowBytes + ((word * 4) ^ (row % 8 * 16));
      store_shared(at, __uint_as_float(__float_as_uint(load_shared(at)) & keep));
    }
  };
  cut_operand(ring.a(), config.block_m, config.a_mn_major);
  cut_operand(ring.b(), config.block_n, config.b_mn_major);
  fence_shared_for_copy_engine();
  named_barrier(1, config.consumers * 128);
}

// sum += scale * part; `boundary` is the tile's first column that takes the second scale.
__forceinline__ void promote(Part& sum, const Part& part, const float (&scale)[2][kScalesPerRow],
                             int boundary) {
  // Opaque, lest the comparisons below are made once for all blocks and kept in registers.
  if constexpr (kScalesPerRow == 2) asm volatile("" : "+r"(boundary));
#pragma unroll
  for (int i = 0; i < config.block_n / 2; ++i) {
    const float* s = scale[i / 2 % 2];  // of the upper or the lower row
    sum[i] += (kScalesPerRow == 2 && i / 4 * 8 >= boundary ? s[kScalesPerRow - 1] : s[0]) * part[i];
  }
}

// Scales of a few of a thread's columns, read from shared memory while others are in use.
struct ColumnScales {
  static constexpr int kFew = 2;  // chunks of eight columns, of which the thread has two each
  float2 scales[kFew];

  __forceinline__ void load(uint32_t shared, int chunk) {
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      scales[i] = load_shared_pair(shared + (8 * (chunk + i) + threadIdx.x % 4 * 2) * 4);
    }
  }
};

// The same with a scale for each column too. `first` are those of the first columns.
__forceinline__ void promote(Part& sum, const Part& part, const float (&scale)[2],
                             ColumnScales first, uint32_t columns) {
  ColumnScales next;
#pragma unroll
  for (int chunk = 0; chunk < config.block_n / 8; chunk += ColumnScales::kFew) {
    if (chunk + ColumnScales::kFew < config.block_n / 8) {
      next.load(columns, chunk + ColumnScales::kFew);
    }
#pragma unroll
    for (int i = 0; i < ColumnScales::kFew; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = 4 * (chunk + i) + 2 * half;
        sum[at] += scale[half] * (first.scales[i].x * part[at]);
        sum[at + 1] += scale[half] * (first.scales[i].y * part[at + 1]);
      }
    }
    first = next;
  }
}

// One tile of FP8.
__forceinline__ void multiply_and_promote(Sum& sum, Reader& reader, const Tiles& tile,
                                          int warp_row) {
  const int lane = threadIdx.x % 32;
  const int boundary = 128 - tile.n0 % 128;
  const int first_block = tile.first_block(), last_block = tile.last_block();
  Part part;
  for (int kb = first_block; kb < last_block; ++kb) {
    reader.wait();
    if constexpr (config.groups == kAlongK) cut(reader.ring, tile, kb);
    const int block = (kb - first_block) % kPromoteBlocks;
    const bool last = block == kPromoteBlocks - 1 || kb == last_block - 1;
#pragma unroll
    for (int w = 0; w < kWaves; ++w) {
      pin(part);
      reader.product(part, w, block > 0);
      const int row = warp_row + lane / 4 + w * kWaveRows;
      if constexpr (config.scales == kBlocks) {
        float scale[2][kScalesPerRow];
#pragma unroll
        for (int i = 0; i < 2 * kScalesPerRow; ++i) {
          const int half = i / kScalesPerRow, which = i % kScalesPerRow;
          scale[half][which] = load_shared(reader.ring.scale(row + half * 8, which));
        }
        wgmma_wait<0>();
        pin(part);
        if (w == kWaves - 1) {
          release(reader.ring);
          reader.advance();
        }
        promote(sum[w], part, scale, boundary);
      } else {
        const float scale[2] = {load_shared(reader.ring.scale(row)),
                                load_shared(reader.ring.scale(row + 8))};
        ColumnScales columns;
        columns.load(reader.ring.scale(0, 1), 0);
        const Ring slot = reader.ring;
        wgmma_wait<0>();
        pin(part);
        if (w == kWaves - 1) reader.advance();
        if (last) promote(sum[w], part, scale, columns, slot.scale(0, 1));
        if (w == kWaves - 1) release(slot);
      }
    }
  }
}

// One tile of bfloat16: a block's product runs while the one before it retires.
__forceinline__ void multiply(Sum& sum, Reader& reader, const Tiles& tile) {
  const int first_block = tile.first_block(), last_block = tile.last_block();
  Ring before = reader.ring;
#pragma unroll
  for (int w = 0; w < kWaves; ++w) pin(sum[w]);
  for (int kb = first_block; kb < last_block; ++kb) {
    reader.wait();
    if constexpr (config.groups == kAlongK) cut(reader.ring, tile, kb);
#pragma unroll
    for (int w = 0; w < kWaves; ++w) reader.product(sum[w], w, true);
    wgmma_wait<kWaves>();
    if (kb > first_block) release(before);
    before = reader.ring;
    reader.advance();
  }
  wgmma_wait<0>();
  if (last_block > first_block) release(before);
#pragma unroll
  for (int w = 0; w < kWaves; ++w) pin(sum[w]);
}

// Writes a warp's rows of a wave straight from registers.
__forceinline__ void store(const Params& p, const Part& sum, const Tiles& tile, int first_row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + threadIdx.x % 32 / 4 + half * 8;
    if (row >= tile.m_end) continue;
    const long long first = (static_cast<long long>(tile.d_batch) * p.m + row) * p.n;
    if constexpr (!config.out_float32) {
      add_row(sum, half, static_cast<unsigned short*>(p.d) + first, tile.n0, p.n);
    } else if (p.accumulate) {
      store_row<true>(sum, half, static_cast<float*>(p.d) + first, tile.n0, p.n);
    } else {
      store_row<false>(sum, half, static_cast<float*>(p.d) + first, tile.n0, p.n);
    }
  }
}

// Writes them as bfloat16 by way of shared memory. Each warp hands its own rows to the copy engine:
// nothing outside the warp waits.
__forceinline__ void store_staged(const Params& p, const Sum& sum, uint32_t shared,
                                  const Tiles& tile, int warp_row) {
  constexpr int box = config.box_n();
  const bool leader = threadIdx.x % 32 == 0;
  if (leader) tma_store_wait_read();
  __syncwarp();
#pragma unroll
  for (int w = 0; w < kWaves; ++w) {
    const int row = tile.m0 + warp_row + w * kWaveRows;
    const uint32_t rows = shared + (warp_row + w * kWaveRows) * config.block_n * 2;
    stage_rows<box>(sum[w], rows);
    fence_shared_for_copy_engine();
    __syncwarp();
    // The copy engine stops at the end of D, not at that of a group.
    const int valid = min(tile.m_end - row, 16);
    if (p.copy_engine && (config.groups != kContiguous || valid == 16)) {
      if (!leader) continue;
      for (int i = 0; i < config.block_n / box; ++i) {
        tma_store(&p.store, rows + i * 16 * box * 2, tile.n0 + i * box, row, tile.d_batch);
      }
      tma_store_commit();
    } else {
      const long long first = (static_cast<long long>(tile.d_batch) * p.m + row) * p.n;
      copy_rows<box>(rows, static_cast<unsigned short*>(p.d) + first + tile.n0, valid,
                     min(config.block_n, p.n - tile.n0), p.n);
    }
  }
}

__forceinline__ void consume(const Params& p, Ring ring, int consumer) {
  const int warp_row = consumer * kConsumerRows + threadIdx.x % 128 / 32 * 16;
  Reader reader{ring, consumer * kConsumerRows};
  reader.look_ahead();
  for (Tiles tile(p); !tile.done; tile.next()) {
    Sum sum = {};
    if constexpr (config.scales == kNoScales) {
      multiply(sum, reader, tile);
    } else {
      multiply_and_promote(sum, reader, tile, warp_row);
    }
    if (!config.out_float32 && !p.accumulate) {
      store_staged(p, sum, ring.d(), tile, warp_row);
    } else {
#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
        store(p, sum[w], tile, tile.m0 + warp_row + w * kWaveRows);
      }
    }
  }
  // Shared memory outlives what the copy engine still reads of it.
  if (threadIdx.x % 32 == 0) tma_store_wait_read();
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
      copy_scales(params, ring, threadIdx.x % 128 - 32);
    }
  } else {
    if constexpr (kMoveRegisters) grow_registers<kConsumerRegisters>();
    consume(params, ring, warp / 4);
  }

  // No CTA may leave while another one of its cluster still signals or writes into it.
  if constexpr (config.cluster() > 1) cluster_sync();
}

}  // namespace deepgemm::gemm
