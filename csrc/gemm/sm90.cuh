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
// zero in `part`, for each block of 128 (multiply_and_promote) or, where scales are the same for
// all of K, for four of them (multiply), and then promoted into `sum`, in FP32. One consumer
// promotes while another one's product runs. Products of bfloat16 add up in `sum`.
//
// Grid: one CTA a multiprocessor; each cluster walks tiles in TileOrder. The loads of the next tile
// begin while this one is being stored. The copy thread, which has time, finds each tile and tells
// the consumers where it lies (announce); the scale warps, which run ahead, find it themselves.
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
constexpr int kProducerRegisters = config.consumers == 2 ? 40 : 56;
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
  static constexpr int kTiles = kScales + config.stages * config.scale_bytes();
  static constexpr int kFull = kTiles + config.tiles() * kTileBytes;
  static constexpr int kEmpty = kFull + config.stages * 8;

  uint32_t a() const { return memory + slot * config.a_bytes(); }
  uint32_t b() const { return memory + kB + slot * config.b_bytes(); }
  uint32_t d() const { return memory + kD; }
  // kBlocks: of a row, with the first or second block of columns. Others: of A's rows, then B's.
  uint32_t scale(int row, int which = 0) const {
    return memory + kScales + slot * config.scale_bytes() + (which * config.block_m + row) * 4;
  }
  // Of a tile, counted round and round.
  uint32_t tile(int number) const { return memory + kTiles + number * kTileBytes; }
  uint32_t full() const { return memory + kFull + slot * 8; }
  uint32_t empty() const { return memory + kEmpty + slot * 8; }

  __forceinline__ void advance() {
    if (++slot == config.stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

__forceinline__ int next_tile(int number) { return number + 1 == config.tiles() ? 0 : number + 1; }

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
    k0 = k_end = 0;
    m_end = p.m;
    TileOrder order = p.order;
    if constexpr (config.groups == kDense) {
      done = index >= order.count();
      if (done) return;
      const Tile t = order(index);
      k_end = p.k;
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
      } else {
        k0 = span.group < 0 ? p.blocks_k * config.block_k() : 0;
        k_end = p.k;
        span.group = max(span.group, 0);
        if constexpr (config.groups == kContiguous) m_end = span.end;
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

  // Blocks of K, counted from K's beginning wherever the group's is. There is one at least: where
  // nothing is to be added up, of zeros, which lie behind K's end or are cut out.
  __forceinline__ bool empty() const { return k_end <= k0; }
  __forceinline__ int first_block() const { return k0 / config.block_k(); }
  __forceinline__ int last_block() const {
    return empty() ? first_block() + 1 : ceil_div(k_end, config.block_k());
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

// What the consumers are told of a tile, before its first slot is full. One without blocks, in a
// slot without data, is the end.
__forceinline__ void announce(uint32_t shared, const Tiles& tile) {
  store_shared_quad(shared, make_uint4(tile.m0, tile.m_end, tile.n0, tile.d_batch));
  const int first_block = tile.first_block();
  store_shared_quad(shared + 16,
                    make_uint4(tile.last_block() - first_block, first_block, tile.k0, tile.k_end));
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
  int number = 0;
  for (; !tile.done; tile.next(), number = next_tile(number)) {
    const int last_block = tile.last_block();
    for (int kb = tile.first_block(); kb < last_block; ++kb, ring.advance()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      if (kb == tile.first_block()) announce(ring.tile(number), tile);
      barrier_arrive_expect(ring.full(), config.a_bytes() + config.b_bytes());
      load<config.a_mn_major, a_rows, config.cluster_n>(ring.a() + a_part * kRowBytes, p.a,
                                                        ring.full(), kb, tile.m0 + a_part,
                                                        tile.a_batch, a_peers);
      load<config.b_mn_major, b_rows, config.cluster_m>(ring.b() + b_part * kRowBytes, p.b,
                                                        ring.full(), kb, tile.n0 + b_part,
                                                        tile.b_batch, b_peers);
    }
  }
  barrier_wait(ring.empty(), ring.parity ^ 1);
  store_shared_quad(ring.tile(number) + 16, make_uint4(0, 0, 0, 0));
  barrier_arrive(ring.full());
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
      : p(p), last_block(min(tile.last_block(), p.blocks_k) - 1) {
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
    if (tile.empty()) a_rows = b_rows = 0;
  }

  __forceinline__ void load(Block& x, int kb) const {
    kb = config.scales == kRows ? 0 : min(kb, last_block);
    const float* a_block = a + static_cast<long long>(kb) * p.m;
#pragma unroll
    for (int j = 0; j < kA; ++j) x.a[j] = j * kStride < a_rows ? __ldg(a_block + j * kStride) : 0;
    if constexpr (config.scales == kBlocks) {
#pragma unroll
      for (int j = 0; j < kB; ++j) {
        x.b[j] = b_rows > 0 ? __ldg(b + (j < b_rows ? j * p.blocks_k : 0) + kb) : 0;
      }
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
  barrier_wait(ring.empty(), ring.parity ^ 1);
  if (threadIdx.x % 32 == 0) barrier_arrive(ring.full());
}

using Part = float[config.block_n / 2];
using Sum = Part[kWaves];

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
    ready = true;
  }

  __forceinline__ void advance() {
    ring.advance();
    look_ahead();
  }

  // Starts one block's product of a wave's rows.
  __forceinline__ void product(Part& d, int wave, bool accumulate) const {
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

// Zeroes what lies outside the group's range of K in the slot of the tile's first or last block, i.
__forceinline__ void cut(const Ring& ring, uint32_t tile, int i) {
  const uint4 x = load_shared_quad(tile + 16);
  const int k = (x.y + i) * config.block_k();
  const int first = max(int(x.z) - k, 0), end = min(int(x.w) - k, config.block_k());
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

// How many blocks the tile has, which is told with its first slot; 0 at the end.
__forceinline__ int begin_tile(Reader& reader, int tile) {
  reader.wait();
  return uniform(load_shared_int(reader.ring.tile(tile) + 16));
}

__forceinline__ void begin_block(Reader& reader, int tile, int i, int blocks) {
  reader.wait();
  if (config.groups == kAlongK && (i == 0 || i == blocks - 1)) {
    cut(reader.ring, reader.ring.tile(tile), i);
  }
}

// sum += scale * part, with the scales of a row's first and second block of columns, of which the
// second begins at `boundary`.
__forceinline__ void promote(Part& sum, const Part& part, const float (&scale)[2][kScalesPerRow],
                             int boundary) {
  // Tiles are aligned with so many columns, and so is the boundary.
  constexpr int aligned = config.block_n & -config.block_n;
#pragma unroll
  for (int first = 0; first < config.block_n; first += aligned) {
    float s[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool second = first >= 128 || first >= aligned && first >= boundary;
      s[half] = kScalesPerRow == 2 && second ? scale[half][kScalesPerRow - 1] : scale[half][0];
    }
#pragma unroll
    for (int i = first / 2; i < (first + aligned) / 2; ++i) {
      sum[i] += s[i / 2 % 2] * part[i];
    }
  }
}

// What a thread's elements of a product are multiplied by: the scales of their rows and columns.
__forceinline__ void load_factors(Part& factors, const Ring& slot, int row) {
  const float scale[2] = {load_shared(slot.scale(row)), load_shared(slot.scale(row + 8))};
#pragma unroll
  for (int chunk = 0; chunk < config.block_n / 8; ++chunk) {
    const float2 column = load_shared_pair(slot.scale(8 * chunk + threadIdx.x % 4 * 2, 1));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factors[4 * chunk + 2 * half] = scale[half] * column.x;
      factors[4 * chunk + 2 * half + 1] = scale[half] * column.y;
    }
  }
}

// Three consumers have no registers for all factors: they are made of the scales of a few columns
// at a time, which are read while others are in use. `first` are those of the first columns.
constexpr bool kFactorsAhead = config.consumers < 3;

struct ColumnScales {
  static constexpr int kFew = 2;  // chunks of eight columns, of which the thread has two each
  float2 scales[kFew];

  __forceinline__ void load(const Ring& slot, int chunk) {
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      scales[i] = load_shared_pair(slot.scale(8 * (chunk + i) + threadIdx.x % 4 * 2, 1));
    }
  }
};

__forceinline__ void promote(Part& sum, const Part& part, const float (&scale)[2],
                             ColumnScales first, const Ring& slot) {
  ColumnScales next;
#pragma unroll
  for (int chunk = 0; chunk < config.block_n / 8; chunk += ColumnScales::kFew) {
    if (chunk + ColumnScales::kFew < config.block_n / 8) {
      next.load(slot, chunk + ColumnScales::kFew);
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

// Where a warp's 16 rows of a tile's sums belong.
struct Output {
  int row, end;  // the first one, and the first that is not the tile's
  int column, batch;

  __forceinline__ Output(uint32_t tile, int row_in_tile) {
    const uint4 x = load_shared_quad(tile);
    row = x.x + row_in_tile;
    end = x.y;
    column = x.z;
    batch = x.w;
  }

  __forceinline__ long long first(const Params& p) const {
    return (static_cast<long long>(batch) * p.m + row) * p.n;
  }
};

// Writes them straight from registers.
__forceinline__ void store(const Params& p, const Part& sum, const Output& to, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    if (to.row + row >= to.end) continue;
    const long long first = to.first(p) + static_cast<long long>(row) * p.n;
    if constexpr (!config.out_float32) {
      add_row(sum, half, static_cast<unsigned short*>(p.d) + first, to.column, p.n, lane);
    } else if (p.accumulate) {
      store_row<true>(sum, half, static_cast<float*>(p.d) + first, to.column, p.n, lane);
    } else {
      store_row<false>(sum, half, static_cast<float*>(p.d) + first, to.column, p.n, lane);
    }
  }
}

// Writes a consumer's sums as bfloat16 by way of shared memory. Each warp hands its own rows to the
// copy engine: nothing outside the warp waits.
__forceinline__ void store_staged(const Params& p, const Sum& sum, const Ring& ring, uint32_t tile,
                                  int warp_row) {
  constexpr int box = config.box_n();
  // Opaque, lest all addresses are found once for all tiles and kept in registers.
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  if (lane == 0) tma_store_wait_read();
  __syncwarp();
  const auto staged = [&](int w) {
    return ring.d() + (warp_row + w * kWaveRows) * config.block_n * 2;
  };
#pragma unroll
  for (int w = 0; w < kWaves; ++w) stage_rows<box>(sum[w], staged(w), lane);
  fence_shared_for_copy_engine();
  __syncwarp();
#pragma unroll
  for (int w = 0; w < kWaves; ++w) {
    const Output to(tile, warp_row + w * kWaveRows);
    // The copy engine stops at the end of D, not at that of a group.
    const int valid = min(to.end - to.row, 16);
    if (p.copy_engine && (config.groups != kContiguous || valid == 16)) {
      if (lane != 0) continue;
      for (int i = 0; i < config.block_n / box; ++i) {
        tma_store(&p.store, staged(w) + i * 16 * box * 2, to.column + i * box, to.row, to.batch);
      }
      tma_store_commit();
    } else {
      copy_rows<box>(staged(w), static_cast<unsigned short*>(p.d) + to.first(p) + to.column, valid,
                     min(config.block_n, p.n - to.column), p.n, lane);
    }
  }
}

// Stores a consumer's sums, and starts them anew.
__forceinline__ void finish(const Params& p, Sum& sum, const Ring& ring, int tile, int warp_row) {
  if (!config.out_float32 && !p.accumulate) {
    store_staged(p, sum, ring, ring.tile(tile), warp_row);
  } else {
#pragma unroll
    for (int w = 0; w < kWaves; ++w) {
      store(p, sum[w], Output(ring.tile(tile), warp_row + w * kWaveRows), threadIdx.x % 32);
    }
  }
#pragma unroll
  for (int w = 0; w < kWaves; ++w) {
#pragma unroll
    for (int i = 0; i < config.block_n / 2; ++i) sum[w][i] = 0;
  }
}

// FP8: each product is promoted.
__forceinline__ void multiply_and_promote(const Params& p, Reader reader, int warp_row) {
  Sum sum = {};
  Part part;
  for (int tile = 0;; tile = next_tile(tile)) {
    const int blocks = begin_tile(reader, tile);
    if (blocks == 0) break;
    const int boundary = 128 - int(uniform(load_shared_int(reader.ring.tile(tile) + 8)) % 128);
    for (int i = 0; i < blocks; ++i) {
      begin_block(reader, tile, i, blocks);
#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
        pin(part);
        reader.product(part, w, false);
        const Ring slot = reader.ring;
        const int row = warp_row + w * kWaveRows + threadIdx.x % 32 / 4;
        const auto retire = [&] {
          wgmma_wait<0>();
          pin(part);
        };
        const auto leave = [&] {
          if (w < kWaves - 1) return;
          release(slot);
          reader.advance();
        };
        // Scales are read while the product runs.
        if constexpr (config.scales == kBlocks) {
          float scale[2][kScalesPerRow];
#pragma unroll
          for (int j = 0; j < 2 * kScalesPerRow; ++j) {
            const int half = j / kScalesPerRow, which = j % kScalesPerRow;
            scale[half][which] = load_shared(slot.scale(row + half * 8, which));
          }
          retire();
          leave();
          promote(sum[w], part, scale, boundary);
        } else if constexpr (kFactorsAhead) {
          Part factors;
          load_factors(factors, slot, row);
          retire();
          leave();
#pragma unroll
          for (int j = 0; j < config.block_n / 2; ++j) sum[w][j] += factors[j] * part[j];
        } else {
          const float scale[2] = {load_shared(slot.scale(row)), load_shared(slot.scale(row + 8))};
          ColumnScales columns;
          columns.load(slot, 0);
          retire();
          promote(sum[w], part, scale, columns, slot);
          leave();
        }
      }
    }
    finish(p, sum, reader.ring, tile, warp_row);
  }
}

// Without scales of blocks: a block's product runs while the one before it retires. Those of
// bfloat16 add up in `sum`; of FP8 so many add up before they are promoted, and the sum is scaled
// at last.
constexpr int kAddUp = 4;

__forceinline__ void multiply(const Params& p, Reader reader, int warp_row) {
  constexpr bool promotes = config.scales == kRows;
  static_assert(!promotes || kWaves == 1);
  Sum sum = {};
  Part part;
  const auto pin_all = [&] {
#pragma unroll
    for (int w = 0; w < kWaves; ++w) pin(sum[w]);
    if constexpr (promotes) pin(part);
  };
  for (int tile = 0;; tile = next_tile(tile)) {
    const int blocks = begin_tile(reader, tile);
    if (blocks == 0) break;
    Ring before = reader.ring;
    pin_all();
    for (int i = 0; i < blocks; ++i) {
      begin_block(reader, tile, i, blocks);
#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
        reader.product(promotes ? part : sum[w], w, !promotes || i % kAddUp > 0);
      }
      wgmma_wait<kWaves>();
      if (i > 0) release(before);
      before = reader.ring;
      reader.advance();
      if (promotes && (i % kAddUp == kAddUp - 1 || i == blocks - 1)) {
        wgmma_wait<0>();
        pin_all();
#pragma unroll
        for (int j = 0; j < config.block_n / 2; ++j) sum[0][j] += part[j];
      }
    }
    wgmma_wait<0>();
    pin_all();
    if constexpr (promotes) {
      Part factors;
      load_factors(factors, before, warp_row + threadIdx.x % 32 / 4);
#pragma unroll
      for (int j = 0; j < config.block_n / 2; ++j) sum[0][j] *= factors[j];
    }
    release(before);
    finish(p, sum, reader.ring, tile, warp_row);
  }
}

__forceinline__ void consume(const Params& p, Ring ring, int consumer) {
  Reader reader{ring, consumer * kConsumerRows};
  reader.look_ahead();
  const int warp_row = reader.first_row + threadIdx.x % 128 / 32 * 16;
  if constexpr (config.scales == kNoScales || config.scales == kRows) {
    multiply(p, reader, warp_row);
  } else {
    multiply_and_promote(p, reader, warp_row);
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
