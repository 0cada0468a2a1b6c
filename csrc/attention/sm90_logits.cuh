// logits[i, j] = s_j * sum over heads h of w[i, h] * max(0, q[i, h] . k[j])
//   for the keys j that query i sees, and -inf for the others             (FP8 operands, K-major)
//
//   copy warp    what to do, queries: 2 slots  \    consumers: one for each group of 64 keys of a
//                keys: ring of `stages` slots  /    tile and each group of a block's queries
//   fill warps   -inf outside of a block's tiles
//
//   full: the slot has been written.  empty: all its readers have finished.
//
// Keys lie along the rows of wgmma, and queries and their heads along its columns: a thread then
// holds a quarter of each query's heads for two keys. So the weights stay in registers for as long
// as the queries do, and the sum over heads takes two instructions an element and few shuffles.
//
// Grid: one CTA a multiprocessor, each with an equal share of all tiles.
#pragma once

#include "attention/config.h"
#include "attention/work.cuh"
#include "device/ptx.cuh"
#include "device/store.cuh"
#include "device/wgmma.cuh"

namespace deepgemm::attention {

constexpr Config config{CONFIG};

constexpr int kQueries = config.queries();  // of a consumer
constexpr int kFillWarps = 3;

// Registers move from the producer, which needs few, to the consumers.
constexpr int kLaunchRegisters = 65536 / config.threads() / 8 * 8;
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters =
    (kLaunchRegisters + (kLaunchRegisters - kProducerRegisters) / config.consumers()) / 8 * 8;

// A place in one of the two rings: a slot, and the parity of how often the ring has gone round.
template <int slots>
struct Place {
  int slot = 0;
  uint32_t parity = 0;

  __forceinline__ void advance() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Where things are in shared memory: slots of queries, of keys, of scales, of parts, barriers.
struct Memory {
  uint32_t base;

  static constexpr int kKeys = 2 * config.q_bytes();
  static constexpr int kScales = kKeys + config.stages * config.key_bytes();
  static constexpr int kParts = kScales + config.stages * config.scale_bytes();
  static constexpr int kBarriers = kParts + 2 * sizeof(Part);

  uint32_t q(int slot) const { return base + slot * config.q_bytes(); }
  uint32_t keys(int slot) const { return base + kKeys + slot * config.key_bytes(); }
  uint32_t scales(int slot) const { return base + kScales + slot * config.scale_bytes(); }
  uint32_t q_full(int slot) const { return base + kBarriers + slot * 16; }
  uint32_t q_empty(int slot) const { return q_full(slot) + 8; }
  uint32_t full(int slot) const { return base + kBarriers + (2 + slot) * 16; }
  uint32_t empty(int slot) const { return full(slot) + 8; }
};

using Queries = Place<2>;
using Keys = Place<config.stages>;

// ---- copies -----------------------------------------------------------------------------------

// Where a sequence's keys from this one on are: the page in the cache, or the first key's number in
// all sequences. -1, which is outside the map and reads as zeros, past the sequence's end.
__forceinline__ int locate(const Params& p, int sequence, int key, int end) {
  if (!p.pages) return sequence * p.keys_end + key;
  const int number = key / p.page_keys;
  if (key >= end || number >= p.max_pages) return -1;
  const int page = p.pages[static_cast<long long>(sequence) * p.max_pages + number];
  if (page < 0 || page >= p.cache_pages) return -1;
  return sequence / p.cache_share * p.cache_pages + page;
}

// By a warp. A tile's keys come in pages, each by a lane of its own, which has looked it up ahead.
__forceinline__ void copy(const Params& p, Share share, Memory memory, Part* parts) {
  const int lane = threadIdx.x % 32;
  const int pages = config.block_keys() / p.page_keys;  // of a tile
  const int lookup = 32 / pages;                        // tiles
  Keys keys;
  for (Queries q;; q.advance()) {
    const Part part = next_part<config>(p, share);
    barrier_wait(memory.q_empty(q.slot), q.parity ^ 1);
    if (lane == 0) {
      parts[q.slot] = part;
      if (part.tiles.begin == part.tiles.end) {
        barrier_arrive(memory.q_full(q.slot));
      } else {
        barrier_arrive_expect(memory.q_full(q.slot), config.q_bytes());
        tma_load<1>(memory.q(q.slot), &p.q, memory.q_full(q.slot), 0, 0, part.query, 0);
      }
    }
    if (part.queries == 0) return;

    const auto look_up = [&](int tile) {
      return locate(p, part.sequence, tile * config.block_keys() + lane * p.page_keys,
                    part.keys_end);
    };
    int page, next_page = look_up(part.tiles.begin);
    for (int i = 0; part.tiles.begin + i < part.tiles.end; ++i, keys.advance()) {
      if (i % lookup == 0) {
        page = next_page;
        next_page = look_up(part.tiles.begin + i + lookup);
      }
      barrier_wait(memory.empty(keys.slot), keys.parity ^ 1);
      if (lane == 0) barrier_arrive_expect(memory.full(keys.slot), config.stage_bytes());
      __syncwarp();
      if (lane / pages == i % lookup) {
        const int row = lane % pages * p.page_keys;
        const int x = p.pages ? 0 : page, z = p.pages ? page : 0;
        tma_load<1>(memory.keys(keys.slot) + row * kRowBytes, &p.keys, memory.full(keys.slot), 0, x,
                    z, 0);
        tma_load<1>(memory.scales(keys.slot) + row * 4, &p.scales, memory.full(keys.slot), x, z, 0,
                    0);
      }
    }
  }
}

// ---- results ----------------------------------------------------------------------------------

__forceinline__ void store(const Params& p, int query, int column, float x) {
  const long long at = static_cast<long long>(query) * p.columns + column;
  if (p.out_float32) {
    static_cast<float*>(p.logits)[at] = x;
  } else {
    static_cast<unsigned short*>(p.logits)[at] = pack_bfloat16(x, 0);
  }
}

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
    *reinterpret_cast<uint4*>(x) = make_uint4(word, word, word, word);
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
        return min(max(tile * config.block_keys() - left, 0), p.columns) * 1ll * size;
      };
      char* row = static_cast<char*>(p.logits) + query * 1ll * p.columns * size;
      fill(row, row + offset_of(part.all.begin), infinity);
      fill(row + offset_of(part.all.end), row + p.columns * 1ll * size, infinity);
    }
  }
}

// ---- products ---------------------------------------------------------------------------------

// Sums value i over four lanes. Lane q gets sums q and q + 4; if there are fewer, sum q modulo
// their number.
template <int count>
__forceinline__ void add_quad(float (&x)[count]) {
  int left = count;
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const bool odd = threadIdx.x & step;
    if (left == 1) {
      x[0] += __shfl_xor_sync(0xffffffff, x[0], step);
      continue;
    }
    left /= 2;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float kept = odd ? x[2 * i + 1] : x[2 * i], given = odd ? x[2 * i] : x[2 * i + 1];
      x[i] = kept + __shfl_xor_sync(0xffffffff, given, step);
    }
  }
}

__forceinline__ void multiply(const Params& p, Memory memory, const Part* parts, int consumer) {
  const float minus_infinity = __int_as_float(0xff800000);
  const int lane = threadIdx.x % 32, quad_lane = lane % 4;
  const int query_group = consumer % config.query_groups;
  const int key_group = consumer / config.query_groups;
  const int warp_key = key_group * kKeyRows + threadIdx.x % 128 / 32 * 16;

  // Queries are summed up to four at a time, for two keys. Of these sums, numbered as add_quad
  // wants them, a lane stores the first of which the number is its own, and of eight one more.
  constexpr int kSummed = kQueries < 4 ? kQueries : 4;
  constexpr int kStored = kSummed < 4 ? 1 : 2;
  const int number = quad_lane % (2 * kSummed);
  const bool stores = number == quad_lane;
  const int lane_query = query_group * kQueries + number % kSummed;
  const int lane_key = warp_key + lane / 4 + number / kSummed * 8;

  Keys keys;
  bool ready = false;
  for (Queries q;; q.advance()) {
    barrier_wait(memory.q_full(q.slot), q.parity);
    const Part part = parts[q.slot];
    if (part.queries == 0) return;
    // Half the weights, since the sum below is of twice the ReLU.
    float weight[kQueries][config.heads / 4];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int query = query_group * kQueries + i;
      const int heads = query < part.queries ? p.heads - quad_lane * 2 : 0;
      const float* w =
          p.weights + static_cast<long long>(part.query + query) * p.heads + quad_lane * 2;
#pragma unroll
      for (int j = 0; j < config.heads / 4; ++j) {
        const int head = j / 2 * 8 + j % 2;
        weight[i][j] = head < heads ? 0.5f * w[head] : 0;
      }
    }
    Range seen[kQueries / kSummed];
#pragma unroll
    for (int i = 0; i < kQueries / kSummed; ++i) {
      const int query = lane_query + i * kSummed;
      seen[i] = seen_keys(p, part.query + min(query, part.queries - 1));
    }

    const uint64_t b = tile_descriptor(memory.q(q.slot) + query_group * config.columns * kRowBytes);
    for (int tile = part.tiles.begin; tile < part.tiles.end; ++tile) {
      if (!ready) barrier_wait(memory.full(keys.slot), keys.parity);
      const uint64_t a = tile_descriptor(memory.keys(keys.slot) + key_group * kKeyRows * kRowBytes);
      float product[config.columns / 2];
      pin(product);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kRowBytes / 32; ++k) {
        wgmma<config.columns>(product, a + 2 * k, b + 2 * k, k);
      }
      wgmma_commit();
      float scale[kStored];
#pragma unroll
      for (int i = 0; i < kStored; ++i) {
        scale[i] = load_shared(memory.scales(keys.slot) + (lane_key + 8 * i) * 4);
      }
      wgmma_wait<0>();
      pin(product);
      __syncwarp();
      if (lane == 0) barrier_arrive(memory.empty(keys.slot));
      keys.advance();
      ready = barrier_test(memory.full(keys.slot), keys.parity);

#pragma unroll
      for (int first = 0; first < kQueries; first += kSummed) {
        float sum[2 * kSummed] = {};
#pragma unroll
        for (int i = 0; i < kSummed * config.heads / 2; ++i) {
          const int query = i / (config.heads / 2), head = i % (config.heads / 2);
          const float x = product[first * config.heads / 2 + i];
          // Twice the ReLU; unlike a maximum it keeps NaN, and both run at full rate.
          float& s = sum[head / 2 % 2 * kSummed + query];
          s = fmaf(x + fabsf(x), weight[first + query][head / 4 * 2 + head % 2], s);
        }
        add_quad(sum);

        const int query = lane_query + first;
        const Range keys = seen[first / kSummed];
#pragma unroll
        for (int i = 0; i < kStored; ++i) {
          const int key = tile * config.block_keys() + lane_key + 8 * i;
          const int column = p.compressed ? key - keys.begin : key;
          const bool inside = key >= keys.begin && key < keys.end;
          if (stores && query < part.queries && static_cast<uint32_t>(column) < p.columns) {
            store(p, part.query + query, column, inside ? sum[i] * scale[i] : minus_infinity);
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(memory.q_empty(q.slot));
  }
}

extern "C" __global__ void __launch_bounds__(config.threads(), 1)
    kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory{uniform(shared_address(shared))};
  const int warp = uniform(threadIdx.x / 32);

  if (warp == 0 && elect_one()) {
    prefetch(&params.q);
    prefetch(&params.keys);
    prefetch(&params.scales);
    for (int i = 0; i < 2; ++i) {
      barrier_init(memory.q_full(i), 1);
      barrier_init(memory.q_empty(i), config.consumers() * 4 + kFillWarps);
    }
    for (int i = 0; i < config.stages; ++i) {
      barrier_init(memory.full(i), 1);
      barrier_init(memory.empty(i), config.consumers() * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();

  Part* parts = reinterpret_cast<Part*>(shared + Memory::kParts);
  static_assert(2 * sizeof(Part) >= config.threads() / 32 * sizeof(int));
  const Share share = share_of_cta<config>(params, reinterpret_cast<int*>(parts));
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
