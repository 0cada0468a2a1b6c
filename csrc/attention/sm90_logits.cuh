// logits[i, j] = s_j * sum over heads h of w[i, h] * max(0, q[i, h] . k[j])
//   for the keys j that query i sees, and -inf for the others             (FP8 operands, K-major)
//
//   copy warp    what to do, queries, weights: 2 slots        \   consumers: each has queries of
//                tiles of 64 keys: ring of `stages` slots     /   its own, or they take turns
//   fill warps   -inf outside of a block's tiles
//
//   full: the slot has been written.  empty: all its readers have finished.
//
// Keys lie along the rows of wgmma, and queries and their heads along its columns, up to four
// queries taking turns: of four, each thread then holds all heads of one, for two keys. So the
// weights stay in registers for as long as the queries do, and the sum over heads takes two
// instructions an element, and shuffles only where threads share a query. While the tensor cores
// multiply, hardly anything else is issued, so that it is the number of instructions that counts,
// and not what overlaps with what.
//
// Grid: one CTA a multiprocessor, each with an equal share of all tiles.
#pragma once

#include "attention/config.h"
#include "attention/work.cuh"
#include "device/numbers.cuh"
#include "device/wgmma.cuh"

namespace deepgemm::attention {

constexpr Config config{CONFIG};

constexpr int kQueries = config.queries();  // of a consumer
constexpr int kAbreast = config.abreast();
constexpr int kSets = kQueries / kAbreast;       // of queries abreast
constexpr int kSharers = 4 / kAbreast;           // neighbours that have heads of the same query
constexpr int kHeads = config.heads / kSharers;  // of a query, that a thread has
constexpr int kFillWarps = 3;

constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = consumer_registers(config.consumers(), kProducerRegisters);

// A place in one of the two rings: a slot, and the parity of how often the ring has gone round.
template <int slots>
struct Place {
  int slot = 0;
  uint32_t parity = 0;

  __forceinline__ void advance(int steps = 1) {
    slot += steps;
    if (slot >= slots) {
      slot -= slots;
      parity ^= 1;
    }
  }
};

// Where things are in shared memory: slots of queries, of keys, of scales, of weights, of parts;
// barriers.
struct Memory {
  uint32_t base;

  static constexpr int kKeys = 2 * config.q_bytes();
  static constexpr int kScales = kKeys + config.stages * kKeyBytes;
  static constexpr int kWeights = kScales + config.stages * kScaleBytes;
  static constexpr int kParts = kWeights + 2 * config.weight_bytes();
  static constexpr int kBarriers = kParts + kWorkBytes;

  uint32_t q(int slot) const { return base + slot * config.q_bytes(); }
  uint32_t keys(int slot) const { return base + kKeys + slot * kKeyBytes; }
  uint32_t scales(int slot) const { return base + kScales + slot * kScaleBytes; }
  uint32_t weights(int slot) const { return base + kWeights + slot * config.weight_bytes(); }
  uint32_t q_full(int slot) const { return base + kBarriers + slot * 16; }
  uint32_t q_empty(int slot) const { return q_full(slot) + 8; }
  uint32_t full(int slot) const { return base + kBarriers + (2 + slot) * 16; }
  uint32_t empty(int slot) const { return full(slot) + 8; }
};

using Queries = Place<2>;
using Keys = Place<config.stages>;

// ---- copies -----------------------------------------------------------------------------------

// Where a sequence's page of keys is: its number in the cache, or its first key's in all sequences.
// -1, which is outside the map and reads as zeros, past the sequence's end.
__forceinline__ int locate(const Params& p, const Part& part, int number) {
  const int key = number * p.page_keys;
  if (!p.pages) return part.sequence * p.keys_end + key;
  const int cache = p.by_sharers(part.sequence) * p.cache_pages;
  if (key >= part.keys_end || number >= p.max_pages) return -1;
  const int page = p.pages[static_cast<long long>(part.sequence) * p.max_pages + number];
  return page < 0 || page >= p.cache_pages ? -1 : cache + page;
}

// By a warp. A tile's keys come in pages, of which each lane has looked one up ahead.
__forceinline__ void copy(const Params& p, Share share, Memory memory, Part* parts) {
  const int lane = threadIdx.x % 32;
  // Queries that are one block read each key once.
  constexpr uint64_t policy = config.query_groups == 1 ? kEvictFirst : kEvictNormal;
  const int stage_bytes = kKeyBytes + (p.pages ? kTileKeys : kScaleBox) * 4;
  Keys keys;
  for (Queries q;; q.advance()) {
    const Part part = next_part<config>(p, share);
    barrier_wait(memory.q_empty(q.slot), q.parity ^ 1);
    const bool any = part.tiles.begin != part.tiles.end;
    int number = part.tiles.begin * p.by_page_keys(kTileKeys) + lane;  // of a page to look up
    int page, next_page = locate(p, part, number);
    for (int i = lane; any && i < config.block_queries() * config.heads; i += 32) {
      const int query = i / config.heads, head = i % config.heads;
      if (query < part.queries && head < p.heads) {
        const long long row = part.query + query;
        copy_async(memory.weights(q.slot) + i * 4, p.weights + row * p.heads + head);
      }
    }
    barrier_arrive_after_copies(memory.q_full(q.slot));
    if (elect_one()) {
      parts[q.slot] = part;
      if (any) {
        barrier_arrive_expect(memory.q_full(q.slot), config.q_bytes());
        for (int i = 0; i < config.block_queries(); i += kAbreast) {
          tma_load_4d(memory.q(q.slot) + i * config.heads * kRowBytes, &p.q, memory.q_full(q.slot),
                      0, 0, part.query + i, 0);
        }
      } else {
        barrier_arrive(memory.q_full(q.slot));
      }
    }
    if (part.queries == 0) return;
    __syncwarp();

    int used = 32;  // of the pages that were looked up
    for (int tile = part.tiles.begin; tile < part.tiles.end; ++tile, keys.advance()) {
      barrier_wait(memory.empty(keys.slot), keys.parity ^ 1);
      const uint32_t full = memory.full(keys.slot);
      if (elect_one()) barrier_arrive_expect(full, stage_bytes);
      for (int row = 0; row < kTileKeys; row += p.page_keys) {
        if (used == 32) {
          used = 0;
          page = next_page;
          next_page = locate(p, part, number += 32);
        }
        const int at = __shfl_sync(0xffffffff, page, used++);
        const int x = p.pages ? 0 : at, z = p.pages ? at : 0;
        if (elect_one()) {
          tma_load(memory.keys(keys.slot) + row * kRowBytes, &p.keys, full, 0, x, z, policy);
          tma_load(memory.scales(keys.slot) + row * 4, &p.scales, full, x / 4 * 4, z, 0, policy);
        }
      }
    }
  }
}

// ---- results ----------------------------------------------------------------------------------

// Fills memory with a word, by a warp, 16 bytes at a time but for what is not aligned.
__forceinline__ void fill(char* begin, char* end, uint32_t word) {
  const int lane = threadIdx.x % 32;
  const auto fill_pairs = [&](char* begin, char* end) {  // of bytes
    char* const x = begin + lane * 2;
    if (x < end) *reinterpret_cast<unsigned short*>(x) = word >> (uint64_t(x) & 2) * 8;
  };
  char* const first = begin + (-uint64_t(begin) & 15);
  char* const last = end - (uint64_t(end) & 15);
  if (first >= last) return fill_pairs(begin, end);
  fill_pairs(begin, first);
  for (char* x = first + lane * 16; x < last; x += 32 * 16) {
    store_result(x, make_uint4(word, word, word, word));
  }
  fill_pairs(last, end);
}

// -inf for what lies outside of a block's tiles.
__forceinline__ void fill_edges(const Params& p, Memory memory, const Part* parts, int warp) {
  const uint32_t infinity = p.out_float32 ? 0xff800000 : 0xff80ff80;
  const int size = p.out_float32 ? 4 : 2;
  for (Queries q;; q.advance()) {
    barrier_wait(memory.q_full(q.slot), q.parity);
    const Part part = parts[q.slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(memory.q_empty(q.slot));
    if (part.queries == 0) return;
    if (!part.edges) continue;
    for (int query = part.query + warp; query < part.query + part.queries; query += kFillWarps) {
      const int left = p.compressed ? seen_keys(p, query).begin : 0;
      const auto offset_of = [&](int tile) {
        return min(max(tile * kTileKeys - left, 0), p.columns) * 1ll * size;
      };
      char* row = static_cast<char*>(p.logits) + query * 1ll * p.columns * size;
      fill(row, row + offset_of(part.all.begin), infinity);
      fill(row + offset_of(part.all.end), row + p.columns * 1ll * size, infinity);
    }
  }
}

// ---- products ---------------------------------------------------------------------------------

// Two sums for each of two keys, over all lanes that share a query: one for each key; where lanes
// do share it, a lane gets in the first place that of the key that its number's last bit says.
__forceinline__ void add_up(float (&x)[2], const float (&sum)[2][2]) {
  x[0] = sum[0][0] + sum[0][1];
  x[1] = sum[1][0] + sum[1][1];
  if constexpr (kSharers > 1) {
    const bool odd = threadIdx.x & 1;
    const float kept = odd ? x[1] : x[0], given = odd ? x[0] : x[1];
    x[0] = kept + __shfl_xor_sync(0xffffffff, given, 1);
  }
  if constexpr (kSharers > 2) x[0] += __shfl_xor_sync(0xffffffff, x[0], 2);
}

// Where a lane stores logits of a query, and which of the columns are of keys that it sees.
struct Row {
  void* logits;
  int shift;  // from the first key of a tile to the column of the lane's key
  int first;
  uint32_t seen, columns;
};

__forceinline__ Row row_of(const Params& p, int query, int lane_key) {
  const Range keys = seen_keys(p, query);
  const int left = p.compressed ? keys.begin : 0;
  char* logits = static_cast<char*>(p.logits) + query * 1ll * p.columns * (p.out_float32 ? 4 : 2);
  return {logits, lane_key - left, keys.begin - left, static_cast<uint32_t>(keys.end - keys.begin),
          static_cast<uint32_t>(p.columns)};
}

// For keys eight apart.
template <class T, int count>
__forceinline__ void store(const Row& row, int column, const T (&x)[count]) {
  T* const to = static_cast<T*>(row.logits) + column;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (static_cast<uint32_t>(column + 8 * i) < row.columns) store_result(to + 8 * i, x[i]);
  }
}

__forceinline__ void multiply(const Params& p, Memory memory, const Part* parts, int consumer) {
  const float minus_infinity = __int_as_float(0xff800000);
  const int lane = threadIdx.x % 32, quad_lane = lane % 4;
  const int query_group = consumer % config.query_groups;
  const int key_group = consumer / config.query_groups;

  // What a lane stores: both of its keys, or one of them, for a query of each set.
  constexpr int kStored = kSharers == 1 ? 2 : 1;
  const bool stores = kSharers < 4 || quad_lane < 2;
  const int lane_query = query_group * kQueries + quad_lane / kSharers;
  const int lane_key = threadIdx.x % 128 / 32 * 16 + lane / 4 + (kStored == 1 ? lane % 2 * 8 : 0);
  // Of each heads_abreast(), the first of the lane's two.
  const int lane_head = quad_lane * 2 % config.heads_abreast();

  Keys keys;
  keys.advance(key_group);
  int skip = key_group;  // tiles of others
  for (Queries q;; q.advance()) {
    barrier_wait(memory.q_full(q.slot), q.parity);
    const Part part = parts[q.slot];
    if (part.queries == 0) return;
    // Half the weights, since the sum below is of twice the ReLU.
    float weight[kSets][kHeads];
    Row rows[kSets];
#pragma unroll
    for (int i = 0; i < kSets; ++i) {
      const int query = lane_query + i * kAbreast;
      const bool valid = query < part.queries;
      rows[i] = row_of(p, part.query + (valid ? query : 0), lane_key);
      if (!stores || !valid) rows[i].columns = 0;
      const uint32_t w = memory.weights(q.slot) + query * config.heads * 4;
#pragma unroll
      for (int j = 0; j < kHeads; j += 2) {
        const int head = j / 2 * config.heads_abreast() + lane_head;
        const float2 pair = load_shared_pair(w + head * 4);
        weight[i][j] = valid && head < p.heads ? 0.5f * pair.x : 0;
        weight[i][j + 1] = valid && head + 1 < p.heads ? 0.5f * pair.y : 0;
      }
    }
    const uint32_t scale_at = (p.pages ? lane_key : lane_key + part.sequence * p.keys_end % 4) * 4;

    const uint64_t b = tile_descriptor(memory.q(q.slot) + query_group * config.columns * kRowBytes);
    // A key's even and odd heads have sums of their own: FMAs that need not wait for each other.
    float sum[kSets][2][2], scale[kStored];
    const auto store_sums = [&](int tile) {
#pragma unroll
      for (int i = 0; i < kSets; ++i) {
        float total[2];
        add_up(total, sum[i]);
        const Row& row = rows[i];
        const int column = tile * kTileKeys + row.shift;
        float x[kStored];
#pragma unroll
        for (int j = 0; j < kStored; ++j) {
          const bool seen = static_cast<uint32_t>(column + 8 * j - row.first) < row.seen;
          x[j] = seen ? total[j] * scale[j] : minus_infinity;
        }
        if (p.out_float32) {
          store(row, column, x);
        } else {
          unsigned short rounded[kStored];
#pragma unroll
          for (int j = 0; j < kStored; ++j) rounded[j] = pack_bfloat16(x[j], 0);
          store(row, column, rounded);
        }
      }
    };

    const int begin = part.tiles.begin + skip;
    int tile = begin;
    for (; tile < part.tiles.end; tile += config.key_groups) {
      barrier_wait(memory.full(keys.slot), keys.parity);
      const uint64_t a = tile_descriptor(memory.keys(keys.slot));
      float product[config.columns / 2];
      pin(product);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kRowBytes / 32; ++k) {
        wgmma<config.columns>(product, a + 2 * k, b + 2 * k, k);
      }
      wgmma_commit();
      // The last tile's, now: what shuffles and stores take is mostly time, of which there is some.
      if (tile != begin) store_sums(tile - config.key_groups);
#pragma unroll
      for (int i = 0; i < kStored; ++i) {
        scale[i] = load_shared(memory.scales(keys.slot) + scale_at + 32 * i);
      }
      wgmma_wait<0>();
      pin(product);
      __syncwarp();
      if (lane == 0) barrier_arrive(memory.empty(keys.slot));
      keys.advance(config.key_groups);
#pragma unroll
      for (int i = 0; i < config.columns / 2; ++i) {
        const int set = i / (2 * kHeads), head = i % (2 * kHeads) / 4 * 2 + i % 2;
        // Twice the ReLU; unlike a maximum it keeps NaN, and runs at full rate.
        const float relu = product[i] + fabsf(product[i]);
        float& to = sum[set][i / 2 % 2][i % 2];
        to = head < 2 ? relu * weight[set][head] : fmaf(relu, weight[set][head], to);
      }
    }
    if (tile != begin) store_sums(tile - config.key_groups);
    skip = tile - part.tiles.end;
    __syncwarp();
    if (lane == 0) barrier_arrive(memory.q_empty(q.slot));
  }
}

// Into L2, what is read to find a CTA's share or as soon as that is known; by all CTAs together.
// The kernel before may still be writing it: so it does into L2.
__forceinline__ void prefetch_tables(const Params& p) {
  const auto fetch = [&](const void* x, long long bytes, long long line) {
    if (line * 128 < bytes) prefetch_l2(static_cast<const char*>(x) + line * 128);
  };
  const long long queries = static_cast<long long>(p.sequences) * p.queries;
  const long long line = static_cast<long long>(threadIdx.x) * gridDim.x + blockIdx.x;
  fetch(p.end, queries * 4, threadIdx.x);
  if (p.start) fetch(p.start, queries * 4, threadIdx.x);
  if (p.pages) fetch(p.pages, static_cast<long long>(p.sequences) * p.max_pages * 4, line);
  fetch(p.weights, queries * p.heads * 4, line);
}

// Into L2, while the CTA's share is being found, what would be its first keys if all sequences had
// as many; by a warp.
__forceinline__ void prefetch_likely_keys(const Params& p) {
  const int lane = threadIdx.x % 32, most = p.by_ctas(0x7fffffff);  // products with CTAs must fit
  if (!p.pages || lane >= config.stages || p.sequences > most) return;
  const int place = blockIdx.x * p.sequences;
  Part part = {};
  part.sequence = p.by_ctas(place);
  part.keys_end = max(0, min(p.end[(part.sequence + 1) * p.queries - 1], p.keys_end));
  const int pages = p.by_page_keys(part.keys_end);
  if (pages > most) return;
  const int first = p.by_ctas((place - part.sequence * int(gridDim.x)) * pages);
  const int page = locate(p, part, first + lane);
  if (page < 0) return;
  tma_prefetch(&p.keys, 0, 0, page, kEvictFirst);
  tma_prefetch(&p.scales, 0, page, 0, kEvictFirst);
}

extern "C" __global__ void __launch_bounds__(config.threads(), 1)
    kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory{shared_address(shared)};
  const int warp = uniform(threadIdx.x / 32);

  prefetch_tables(params);

  if (warp == 0 && elect_one()) {
    prefetch(&params.q);
    prefetch(&params.keys);
    prefetch(&params.scales);
    for (int i = 0; i < 2; ++i) {
      barrier_init(memory.q_full(i), 1 + 32);
      barrier_init(memory.q_empty(i), config.consumers() * 4 + kFillWarps);
    }
    for (int i = 0; i < config.stages; ++i) {
      barrier_init(memory.full(i), 1);
      barrier_init(memory.empty(i), config.query_groups * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (warp == config.threads() / 32 - 1) prefetch_likely_keys(params);

  static_assert(config.stages % config.key_groups == 0);  // A slot is always the same consumer's.
  static_assert(sizeof(Scratch) <= kWorkBytes && 2 * sizeof(Part) <= kWorkBytes);
  Part* const parts = reinterpret_cast<Part*>(shared + Memory::kParts);
  const Share share = share_of_cta<config>(params, reinterpret_cast<Scratch&>(*parts));
  __syncthreads();
  if (warp / 4 == config.consumers()) {
    shrink_registers<kProducerRegisters>();
    if (warp % 4 == 0) {
      copy(params, share, memory, parts);
    } else {
      fill_edges(params, memory, parts, warp % 4 - 1);
    }
  } else {
    grow_registers<kConsumerRegisters>();
    multiply(params, memory, parts, warp / 4);
  }
}

}  // namespace deepgemm::attention
