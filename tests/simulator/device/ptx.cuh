// csrc/device/ptx.cuh for the simulator.
#pragma once

#include <array>

#include "device/types.h"
#include "simulator.h"

namespace deepgemm {

using ::uint32_t;
using ::uint64_t;

// What stands in a TensorMap's bytes here.
struct Map {
  char* data;
  uint64_t sizes[4], strides[4];  // in elements, in bytes
  uint32_t box[4];
  uint32_t element_bytes, swizzle_bytes;
};
static_assert(sizeof(Map) <= sizeof(TensorMap));

inline uint32_t swizzled(uint32_t address, uint32_t bytes) {
  return address ^ (address >> 7 & (bytes / 16 - 1)) << 4;
}

// Calls visit(element in shared memory, the same in global memory or null if it has none there).
template <class Visit>
void for_box(const TensorMap* tensor_map, uint32_t shared, std::array<int64_t, 4> start,
             Visit visit) {
  Map map;
  std::memcpy(&map, tensor_map, sizeof map);
  if ((shared & 0xffffff) % (8 * map.swizzle_bytes)) sim::fail("a box at an odd address");
  // The hardware has no word for this but "illegal instruction".
  if (start[0] * int64_t(map.element_bytes) % 16) sim::fail("a box at an odd coordinate");
  uint32_t at = shared;
  const auto walk = [&](const auto& walk, int dim, char* global) -> void {
    if (dim < 0) {
      visit(sim::shared(swizzled(at, map.swizzle_bytes), map.element_bytes), global,
            map.element_bytes);
      at += map.element_bytes;
      return;
    }
    for (int64_t i = start[dim]; i < start[dim] + map.box[dim]; ++i) {
      const bool inside = global && i >= 0 && i < int64_t(map.sizes[dim]);
      walk(walk, dim - 1, inside ? global + i * map.strides[dim] : nullptr);
    }
  };
  walk(walk, 3, map.data);
}

inline uint32_t shared_address(const void*) { return sim::dynamic_shared(); }
inline uint32_t at_cta(uint32_t shared, int cta_rank) {
  return (shared & 0xffffff) | cta_rank << 24;
}
inline bool elect_one() { return sim::self().lane() == 0; }

// ---- mbarrier ---------------------------------------------------------------------------------

inline void barrier_init(uint32_t barrier, int arrivals) {
  sim::shared(barrier, 8);
  sim::cta_of(barrier).barriers[barrier & 0xffffff] = {arrivals, arrivals};
}
inline void barrier_arrive(uint32_t barrier) { sim::advance(sim::barrier(barrier), 1, 0); }
inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
  sim::advance(sim::barrier(barrier), 1, bytes);
}
inline void barrier_arrive_at(uint32_t remote) { barrier_arrive(remote); }
inline bool barrier_test(uint32_t barrier, uint32_t parity) {
  return sim::barrier(barrier).phase % 2 != parity;
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_test(barrier, parity)) sim::yield();
}
inline void fence_barrier_init() {}

// ---- copies -----------------------------------------------------------------------------------

inline void prefetch(const TensorMap*) {}
inline void prefetch_l2(const void*) {}
constexpr uint64_t kEvictFirst = 0, kEvictNormal = 0, kEvictLast = 0;
inline void tma_prefetch(const TensorMap*, int, int, int, uint64_t) {}

inline void load_box(uint32_t shared, const TensorMap* map, uint32_t barrier,
                     std::array<int64_t, 4> start, unsigned short peers) {
  sim::later([=] {
    for (uint32_t rank = 0; rank < 16; ++rank) {
      if (!(peers >> rank & 1)) continue;
      long bytes = 0;
      for_box(map, (shared & 0xffffff) | rank << 24, start,
              [&](char* to, const char* from, int count) {
                from ? std::memcpy(to, from, count) : std::memset(to, 0, count);
                bytes += count;
              });
      sim::advance(sim::barrier((barrier & 0xffffff) | rank << 24), 0, -bytes);
    }
  });
}

inline void tma_load(uint32_t shared, const TensorMap* map, uint32_t barrier, int x, int y, int z,
                     uint64_t = 0) {
  load_box(shared, map, barrier, {x, y, z, 0}, 1 << sim::self().cta->rank);
}

inline void tma_load_4d(uint32_t shared, const TensorMap* map, uint32_t barrier, int x, int y,
                        int z, int w) {
  load_box(shared, map, barrier, {x, y, z, w}, 1 << sim::self().cta->rank);
}

inline void tma_multicast(uint32_t shared, const TensorMap* map, uint32_t barrier, int x, int y,
                          int z, unsigned short peers) {
  load_box(shared, map, barrier, {x, y, z, 0}, peers);
}

inline void copy_async_or_clear(void* to, const void* x, bool valid) {
  valid ? std::memcpy(to, x, 16) : std::memset(to, 0, 16);
}
inline void wait_for_copies() {}

// They all take place when the barrier is told of them.
inline void copy_async(uint32_t shared, const float* x) {
  sim::self().copies.push_back([=] { std::memcpy(sim::shared(shared, 4), x, 4); });
}
inline void barrier_arrive_after_copies(uint32_t barrier) {
  sim::later([=, copies = std::move(sim::self().copies)] {
    for (auto& copy : copies) copy();
    barrier_arrive(barrier);
  });
  sim::self().copies.clear();
}

template <class Write>
void store_box(const TensorMap* map, uint32_t shared, std::array<int64_t, 4> start, Write write) {
  sim::Thread* thread = sim::current;
  ++thread->stores;
  sim::later([=] {
    for_box(map, shared, start, [=](const char* from, char* to, int count) {
      if (to) write(to, from, count);
    });
    --thread->stores;
  });
}
inline void tma_store(const TensorMap* map, uint32_t shared, int x, int y, int z, int w, uint64_t) {
  store_box(map, shared, {x, y, z, w},
            [](char* to, const char* from, int count) { std::memcpy(to, from, count); });
}
inline void tma_add(const TensorMap* map, uint32_t shared, int x, int y, int z, int w) {
  store_box(map, shared, {x, y, z, w}, [](char* to, const char* from, int count) {
    if (count != 4) sim::fail("a sum of what is not float32");
    *reinterpret_cast<float*>(to) += *reinterpret_cast<const float*>(from);
  });
}
inline void tma_store_commit() {}
inline void tma_store_wait_read() {
  while (sim::self().stores) sim::yield();
}
inline void fence_shared_for_copy_engine() {}

inline float load_shared(uint32_t at) { return *reinterpret_cast<float*>(sim::shared(at, 4)); }
inline float2 load_shared_pair(uint32_t at) {
  return *reinterpret_cast<float2*>(sim::shared(at, 8));
}
inline uint4 load_shared_quad(uint32_t at) {
  return *reinterpret_cast<uint4*>(sim::shared(at, 16));
}
inline unsigned short load_shared_half(uint32_t at) {
  return *reinterpret_cast<unsigned short*>(sim::shared(at, 2));
}
inline int load_shared_int(uint32_t at) { return *reinterpret_cast<int*>(sim::shared(at, 4)); }
inline void store_shared_quad(uint32_t at, uint4 x) {
  *reinterpret_cast<uint4*>(sim::shared(at, 16)) = x;
}
inline void store_shared_pair(uint32_t at, float x, float y) {
  *reinterpret_cast<float2*>(sim::shared(at, 8)) = {x, y};
}
inline void store_shared(uint32_t at, float x) {
  *reinterpret_cast<float*>(sim::shared(at, 4)) = x;
}

inline void named_barrier(int number, int threads) {
  sim::meet(sim::self().cta->meetings[number], threads);
}

// ---- results ----------------------------------------------------------------------------------

inline float bfloat16_to_float(unsigned short bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
inline uint32_t to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return to_bfloat16(low) | to_bfloat16(high) << 16;
}

inline void stmatrix(uint32_t shared, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  const uint64_t* rows = sim::exchange(shared);
  const uint32_t x[] = {x0, x1, x2, x3};
  const int lane = sim::self().lane();
  for (int i = 0; i < 4; ++i) {
    std::memcpy(sim::shared(rows[8 * i + lane / 4], 16) + lane % 4 * 4, &x[i], 4);
  }
  __syncwarp();
}

inline uint32_t transpose_matrix(uint32_t x) {
  const uint64_t* rows = sim::exchange(x);
  const int lane = sim::self().lane();
  const auto element = [&](int row) {
    return rows[4 * row + lane / 4 / 2] >> lane / 4 % 2 * 16 & 0xffff;
  };
  return element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
}

inline void stmatrix_transposed(uint32_t shared, uint32_t x0, uint32_t x1, uint32_t x2,
                                uint32_t x3) {
  const uint32_t x[] = {transpose_matrix(x0), transpose_matrix(x1), transpose_matrix(x2),
                        transpose_matrix(x3)};
  stmatrix(shared, x[0], x[1], x[2], x[3]);
}

// ---- clusters, dependent launches, registers --------------------------------------------------

inline uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }
inline uint32_t opaque(uint32_t x) { return x; }
inline int cluster_rank() { return sim::self().cta->rank; }
inline void cluster_arrive() {
  sim::self().arrived_in = sim::arrive(sim::running->meeting, sim::running->threads.size());
}
inline void cluster_wait() { sim::wait(sim::running->meeting, sim::self().arrived_in); }
inline void send(uint32_t remote, uint32_t remote_barrier, const float* x) {
  sim::later([=, x = float4{x[0], x[1], x[2], x[3]}] {
    std::memcpy(sim::shared(remote, 16), &x, 16);
    sim::advance(sim::barrier(remote_barrier), 0, -16);
  });
}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
template <int count>
void grow_registers() {}
template <int count>
void shrink_registers() {}

}  // namespace deepgemm
