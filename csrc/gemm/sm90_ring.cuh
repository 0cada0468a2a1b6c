// What all roles of sm90.cuh share: the ring in shared memory, and the walk over tiles.
#pragma once

#include "device/ptx.cuh"
#include "device/scheduler.cuh"
#include "gemm/config.h"

namespace deepgemm::gemm {

constexpr Config config{CONFIG};

constexpr int kScalesPerRow = config.scales_per_row();
constexpr int kScaleWarps = 2;  // if there are scales
constexpr int kFewBlocks = 32;  // of K
constexpr int kShortSum = 16;   // blocks of K

// How many slots behind a tile's blocks bring C. A float32 C is added to by the copy engine unless
// K is short: L2 takes long for such a store, which long tiles hide. Where D's rows are no whole
// boxes, threads add.
__forceinline__ int slots_of_c(const Params& p, int blocks) {
  const bool loaded = config.accumulate && (!config.out_float32 || blocks <= kShortSum);
  return loaded && p.copy_engine ? config.c_slots() : 0;
}

// What every slot has, so many bytes from one slot's to the next one's: where it is, by way of
// where the slot's barrier is, which takes one multiplication. The origin is that of a barrier at
// 0.
template <int bytes>
struct InSlots {
  uint32_t origin;

  __forceinline__ InSlots(uint32_t barrier, uint32_t here)
      : origin(opaque(here - barrier * (bytes / 8))) {}

  __forceinline__ uint32_t of(uint32_t barrier) const { return origin + barrier * (bytes / 8); }
};

// Where things are in shared memory: slots of A, of B, D on its way out, slots of scales, barriers.
// A position in the ring is a slot, told by its barrier, and the parity of how often the ring has
// gone round.
struct Ring {
  uint32_t first, end;  // barriers: of the first slot, behind that of the last one
  InSlots<config.scale_bytes()> all_scales;
  uint32_t at;
  uint32_t parity = 0;

  static constexpr int kB = config.stages * config.a_bytes();
  static constexpr int kD = kB + config.stages * config.b_bytes();
  static constexpr int kScales = kD + config.d_bytes();
  static constexpr int kTiles = kScales + config.stages * config.scale_bytes();
  static constexpr int kFull = kTiles + config.tiles() * kTileBytes;
  static constexpr int kEmpty = kFull + config.stages * 8;

  __forceinline__ explicit Ring(uint32_t memory)
      : first(opaque(memory + kFull)),
        end(opaque(memory + kEmpty)),
        all_scales(memory + kFull, memory + kScales),
        at(memory + kFull) {}

  uint32_t memory() const { return first - kFull; }
  uint32_t a() const { return memory() + (at - first) * (config.a_bytes() / 8); }
  uint32_t b() const { return memory() + kB + (at - first) * (config.b_bytes() / 8); }
  uint32_t c(int box) const {
    return box < config.c_boxes_in_a() ? a() + box * config.c_box_bytes()
                                       : b() + (box - config.c_boxes_in_a()) * config.c_box_bytes();
  }
  uint32_t d() const { return memory() + kD; }
  uint32_t scales() const { return all_scales.of(at); }
  // kBlocks: of a row, with the first or second block of columns. kRows: of A's rows, then B's.
  uint32_t scale(int row, int which = 0) const {
    return scales() + (which * config.block_m + row) * 4;
  }
  // kChannels: of a row of A, or of B behind them, the first or second half of K.
  uint32_t factors(int row, int half = 0) const {
    return scales() + row * kFactorBytes + (row / 4 % 2 ^ half) * (kFactorBytes / 2);
  }
  // Of a tile, counted round and round.
  uint32_t tile(int number) const { return memory() + kTiles + number * kTileBytes; }
  uint32_t full() const { return at; }
  uint32_t empty() const { return at + config.stages * 8; }

  __forceinline__ void advance() {
    at += 8;
    if (at == end) {
      at = first;
      parity ^= 1;
    }
  }
};

// kChannels: where the factor of a thread's element, or of a column, is. Columns change places in
// pairs, so that a factor is in a register of the other bank than the product and the sum, which
// are stored in pairs: an FMA whose operands are all in one bank takes two clocks.
constexpr int factor_of(int i) { return i ^ 1; }

__forceinline__ int next_tile(int number) { return number + 1 == config.tiles() ? 0 : number + 1; }

// The tiles of this CTA, one after the other.
struct Tiles {
  const Params& p;
  int index;           // among the clusters' tiles, of the group if there are groups
  int number = 0;      // of the group; kContiguous: of the span, from -1 down of those of no group
  int m_rank, n_rank;  // this CTA's place in its cluster
  int m0, n0;          // the tile's first element
  int m_end;           // first row that is not the tile's to write
  int k0, k_end;       // elements along K
  int a_batch, b_batch, d_batch;
  bool b_once;  // no other rows are multiplied with the tile's B
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
    int rows = p.order.rows;
    if constexpr (config.groups == kDense) {
      int part = 0, at = index;
      if (slice()) {
        part = (index - p.first_slice) % config.slices();
        at = p.first_slice + (index - p.first_slice) / config.slices();
      }
      done = at >= p.order.count();
      if (done) return;
      const Tile t = p.order(at);
      k_end = p.k;
      a_batch = b_batch = d_batch = t.batch;
      place(part * 64, t);
      if (slice()) {
        m_end = min(m0 + 64, p.m);
        done = m0 >= m_end;
      }
    } else {
      Span span;
      int count;
      for (;; index -= count, number += number < 0 ? -1 : 1) {
        done = !next_span(span);
        // The tiles of no group, which take little time, come last.
        if (config.groups == kContiguous && done && number >= 0) {
          number = -1;
          done = !next_span(span);
        }
        if (done) return;
        if constexpr (config.groups != kAlongK) {
          rows = ceil_div(span.end - span.start, config.block_m * config.cluster_m);
        }
        count = rows * p.order.columns;
        if (index < count) break;
      }
      if constexpr (config.groups == kAlongK) {
        k0 = span.start;
        k_end = span.end;
        span.start = 0;
      } else {
        k_end = span.group < 0 ? 0 : p.k;
        span.group = max(span.group, 0);
        m_end = span.end;
      }
      a_batch = config.groups == kMasked ? number : 0;
      b_batch = config.groups == kAlongK ? 0 : span.group;
      d_batch = config.groups == kContiguous ? 0 : number;
      place(span.start, p.order.in_group(index, rows));
    }
    b_once = rows == 1;
  }

  __forceinline__ bool next_span(Span& span) const {
    if (config.groups == kContiguous && p.spans) {
      const int at = number < 0 ? p.m + 1 + number : number;
      const int4 x = reinterpret_cast<const int4*>(p.spans)[at];
      span = {x.x, x.y, x.z};
      return span.start < p.m;
    }
    if (number == p.num_groups) return false;
    if constexpr (config.groups == kMasked) {
      span = {0, min(p.sizes[number], p.m), number};
    } else if (number >= 0) {
      span.start = max(p.starts[number], 0);
      span.end = max(min(p.ends[number], config.groups == kAlongK ? p.k : p.m), span.start);
      span.group = number;
    } else {
      // Rows of no group are behind the last one, and before the first.
      const bool behind = number == -1;
      span.start = behind ? p.ends[p.num_groups - 1] : 0;
      span.end = behind ? p.m : *p.starts;
      span.group = -1;
      return number >= -2;
    }
    return true;
  }

  __forceinline__ void place(int first_row, Tile t) {
    m0 = first_row + (t.m * config.cluster_m + m_rank) * config.block_m;
    n0 = (t.n * config.cluster_n + n_rank) * config.block_n;
  }

  __forceinline__ void next() {
    index += gridDim.x / config.cluster();
    locate();
  }

  // A part of a tile: the first consumer's. There is no tile behind it.
  __forceinline__ bool slice() const { return config.slices() > 1 && index >= p.first_slice; }

  __forceinline__ bool a_whole() const { return m0 + config.block_m <= m_end; }
  __forceinline__ bool b_whole() const { return n0 + config.block_n <= p.n; }

  // Blocks of K, counted from K's beginning wherever the group's is. There is one at least: of a
  // range without elements all of it is cut out, of rows of no group it is not even loaded.
  __forceinline__ bool empty() const { return k_end <= k0; }
  // Of rows of no group.
  __forceinline__ bool of_none() const { return config.groups == kContiguous && empty(); }
  __forceinline__ int first_block() const { return k0 / config.block_k(); }
  __forceinline__ int last_block() const {
    return empty() ? first_block() + 1 : ceil_div(k_end, config.block_k());
  }
  __forceinline__ int blocks() const { return last_block() - first_block(); }

  // Consumers without any rows of the tile pass over it, unless K is long. There it is worth more
  // that all CTAs stay in step, and find in L2 what others have loaded.
  __forceinline__ int multiplied_rows() const {
    if (of_none()) return 0;
    const bool may_pass = config.groups != kAlongK && blocks() <= kFewBlocks;
    return slice() || may_pass ? m_end - m0 : config.block_m;
  }
};

}  // namespace deepgemm::gemm
