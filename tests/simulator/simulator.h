// Runs a kernel's source on the host, to see without a GPU that what it computes is right.
//
// Each thread of a CTA, and of the CTAs of its cluster, is a fibre; clusters run one after the
// other. Where CUDA C++ needs PTX, the headers of tests/simulator/device stand in for those of
// csrc/device. What the hardware does by itself takes place as late as it may, or at any time: a
// product when it is waited for, a copy after a random while. So a slot that is read too early or
// overwritten too soon gives a wrong result here too.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace sim {

struct Barrier {
  int expected = 0, pending = 0;
  long bytes = 0;  // still to be copied
  unsigned phase = 0;
};

// What a group of threads arrives at to go on together.
struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t given[32], received[2][32];
};

struct Cluster;

struct Cta {
  static constexpr int kBase = 1024, kBytes = 232448;  // of dynamic shared memory

  Cluster* cluster;
  unsigned rank, index;
  char* memory;             // that starts at kBase
  std::vector<char> owned;  // where it is, if not where the kernel's own pointers lead
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Meeting> meetings;
  std::vector<Warp> warps;
};

struct Index {
  unsigned x, y = 0, z = 0;
};

struct Thread {
  Cta* cta;
  Index index;
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool done = false;
  int stores = 0;                                            // that have not yet read shared memory
  std::vector<std::vector<std::function<void()>>> products;  // groups that have not been waited for
  std::vector<std::function<void()>> product;                // not yet committed
  std::vector<std::function<void()>> copies;                 // that no barrier has been told of
  unsigned arrived_in = 0;                                   // generation of the cluster's meeting

  Warp& warp() { return cta->warps[index.x / 32]; }
  int lane() const { return index.x % 32; }
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Thread>> threads;
  std::deque<std::function<void()>> copies;  // under way
  std::mt19937 random{1};
  Meeting meeting;
  long events = 0;
};

inline Thread* current;
inline Cluster* running;
inline ucontext_t scheduler;
inline Index block_dim, grid_dim;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simulator: %s, in thread %u of CTA %u\n", what, current->index.x,
               current->cta->index);
  std::abort();
}

inline Thread& self() { return *current; }
inline void yield() { swapcontext(&self().context, &scheduler); }
inline void happened() { ++running->events; }

// The generation of those who go on together.
inline unsigned arrive(Meeting& meeting, int threads) {
  const unsigned generation = meeting.generation;
  happened();
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  return generation;
}

inline void wait(const Meeting& meeting, unsigned generation) {
  while (meeting.generation == generation) yield();
}

inline void meet(Meeting& meeting, int threads) { wait(meeting, arrive(meeting, threads)); }

// What each lane of the warp gives.
inline const uint64_t* exchange(uint64_t value) {
  Warp& warp = self().warp();
  warp.given[self().lane()] = value;
  const int parity = warp.meeting.generation % 2;
  if (warp.meeting.arrived == 31) std::memcpy(warp.received[parity], warp.given, sizeof warp.given);
  meet(warp.meeting, 32);
  return warp.received[parity];
}

// Shared memory is named by the CTA's rank in its cluster and an offset.
inline uint32_t dynamic_shared() { return self().cta->rank << 24 | Cta::kBase; }
inline Cta& cta_of(uint32_t address) {
  if (address >> 24 >= running->ctas.size()) fail("no such CTA");
  return *running->ctas[address >> 24];
}
inline char* shared(uint32_t address, int bytes) {
  const uint32_t offset = address & 0xffffff;
  if (offset < Cta::kBase || offset + bytes > Cta::kBase + Cta::kBytes)
    fail("outside shared memory");
  if (offset % bytes && bytes <= 16) fail("a misaligned access to shared memory");
  return cta_of(address).memory + offset - Cta::kBase;
}

inline Barrier& barrier(uint32_t address) {
  auto& barriers = cta_of(address).barriers;
  const auto found = barriers.find(address & 0xffffff);
  if (found == barriers.end()) fail("a barrier that was not initialised");
  return found->second;
}

inline void advance(Barrier& barrier, int arrivals, long bytes) {
  happened();
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (barrier.pending < 0) fail("more arrivals than a barrier expects");
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.expected;
    ++barrier.phase;
  }
}

inline void later(std::function<void()> copy) { running->copies.push_back(std::move(copy)); }

inline void enter() {
  body();
  self().done = true;
  happened();
  yield();
}

inline void run(Cluster& cluster) {
  running = &cluster;
  for (size_t left = cluster.threads.size(); left;) {
    const long before = cluster.events;
    for (auto& thread : cluster.threads) {
      if (thread->done) continue;
      current = thread.get();
      swapcontext(&scheduler, &current->context);
      left -= current->done;
      while (!cluster.copies.empty() && cluster.random() % 64 == 0) {
        const size_t which = cluster.random() % cluster.copies.size();
        const auto copy = cluster.copies[which];
        cluster.copies.erase(cluster.copies.begin() + which);
        copy();
        happened();
      }
    }
    if (cluster.events == before && cluster.copies.empty()) fail("all threads wait");
  }
  for (auto& copy : cluster.copies) copy();
}

// `memory`: the array that is dynamic shared memory to the kernel, if it is to the kernel more than
// an address; it is so to CTAs that run one at a time.
template <class Kernel>
void launch(unsigned grid, unsigned block, unsigned cluster_size, Kernel kernel,
            char* memory = nullptr) {
  body = kernel;
  block_dim = {block};
  grid_dim = {grid};
  for (unsigned first = 0; first < grid; first += cluster_size) {
    Cluster cluster;
    for (unsigned rank = 0; rank < cluster_size; ++rank) {
      auto cta = std::make_unique<Cta>();
      cta->cluster = &cluster;
      cta->rank = rank;
      cta->index = first + rank;
      cta->warps.resize(block / 32);
      if (!memory) cta->owned.resize(Cta::kBytes);
      cta->memory = memory ? memory : cta->owned.data();
      // As if another kernel had left its data there.
      std::memset(cta->memory, 0x7f, Cta::kBytes);
      for (unsigned i = 0; i < block; ++i) {
        auto thread = std::make_unique<Thread>();
        thread->cta = cta.get();
        thread->index = {i};
        getcontext(&thread->context);
        thread->context.uc_stack.ss_sp = thread->stack.data();
        thread->context.uc_stack.ss_size = thread->stack.size();
        thread->context.uc_link = nullptr;
        makecontext(&thread->context, enter, 0);
        cluster.threads.push_back(std::move(thread));
      }
      cluster.ctas.push_back(std::move(cta));
    }
    run(cluster);
  }
}

}  // namespace sim

// ---- what CUDA C++ has without headers ----------------------------------------------------------

#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // of all fibres, and of one CTA at a time

#define threadIdx (sim::self().index)
#define blockIdx (sim::Index{sim::self().cta->index})
#define gridDim sim::grid_dim

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T>
T min(T x, T y) {
  return y < x ? y : x;
}
template <class T>
T max(T x, T y) {
  return x < y ? y : x;
}

template <class To, class From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __uint_as_float(unsigned x) { return bits_of<float>(x); }
inline float __int_as_float(int x) { return bits_of<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_of<unsigned>(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= unsigned(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline void __syncwarp() { sim::exchange(0); }
inline void __syncthreads() { sim::meet(sim::self().cta->meetings[0], sim::block_dim.x); }

template <class T>
T from_lane(T x, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = sim::exchange(bits)[lane];
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
T __shfl_sync(unsigned, T x, int lane, int width = 32) {
  return from_lane(x, sim::self().lane() / width * width + lane % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return from_lane(x, sim::self().lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int count) {
  return from_lane(x, max(sim::self().lane() - count, 0));
}
inline int __reduce_min_sync(unsigned, int x) {
  const uint64_t* given = sim::exchange(static_cast<uint32_t>(x));
  for (int lane = 0; lane < 32; ++lane) x = min(x, static_cast<int>(given[lane]));
  return x;
}
inline int __reduce_max_sync(unsigned mask, int x) { return ~__reduce_min_sync(mask, ~x); }
inline unsigned __ballot_sync(unsigned, bool x) {
  const uint64_t* given = sim::exchange(x);
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= unsigned(given[lane] != 0) << lane;
  return mask;
}
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  const uint64_t* given = sim::exchange(x);
  for (int lane = 0; lane < 32; ++lane) x |= unsigned(given[lane]);
  return x;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __reduce_add_sync(unsigned, int x) {
  const uint64_t* given = sim::exchange(unsigned(x));
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += int(given[lane]);
  return sum;
}

// No thread runs while another does.
template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p += x;
  return before;
}
