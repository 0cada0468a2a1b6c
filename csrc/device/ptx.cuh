// PTX that has no CUDA C++ spelling without headers: barriers, the copy engine, clusters,
// registers. Names follow the PTX ISA; see its sections on mbarrier, cp.async.bulk.tensor and
// griddepcontrol.
#pragma once

#include "device/types.h"

namespace deepgemm {

using uint32_t = unsigned int;
using uint64_t = unsigned long long;

__forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// One lane of a converged warp, and one that the compiler knows to be one.
__forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected));
  return elected;
}

// ---- mbarrier ---------------------------------------------------------------------------------
// Barriers, like all of shared memory here, are named by their address in it.

__forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the barrier's phase last until so many bytes have been copied.
__forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives on a barrier of any CTA of the cluster (see at_cta). It carries no data between the CTAs,
// so it is not a release at cluster scope, which would drain every store first.
__forceinline__ void barrier_arrive_at(uint32_t remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

// Whether the phase of this parity is over; does not wait.
__forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

__forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Makes initialised barriers visible to the copy engine and to the cluster's other CTAs.
__forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// ---- copies -----------------------------------------------------------------------------------

__forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Has L2 read the 128 bytes around an address.
__forceinline__ void prefetch_l2(const void* x) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(x) : "memory");
}

// Which lines leave L2 first, as createpolicy encodes it. What is read once takes the place of
// other such bytes first, and so leaves there what others read again, and what has yet to be
// written to memory.
constexpr uint64_t kEvictFirst = 0x12F0000000000000, kEvictNormal = 0x1000000000000000,
                   kEvictLast = 0x14F0000000000000;

__forceinline__ void tma_load(uint32_t shared, const TensorMap* map, uint32_t barrier, int x, int y,
                              int z, uint64_t policy = kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

__forceinline__ void tma_load_4d(uint32_t shared, const TensorMap* map, uint32_t barrier, int x,
                                 int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// The box lands at the same address, and counts towards the barrier at the same address, in each
// CTA of `peers`.
__forceinline__ void tma_multicast(uint32_t shared, const TensorMap* map, uint32_t barrier, int x,
                                   int y, int z, unsigned short peers) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(peers)
      : "memory");
}

// Brings a box as far as L2.
__forceinline__ void tma_prefetch(const TensorMap* map, int x, int y, int z, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.3d.L2.global.L2::cache_hint [%0, {%1, %2, %3}], %4;" ::"l"(
          map),
      "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

// Copies 16 bytes in the background, past L1, or writes zeros if there is nothing to read.
__forceinline__ void copy_async_or_clear(void* to, const void* x, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(x),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Until what this thread copies in the background has landed.
__forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Copies one float in the background.
__forceinline__ void copy_async(uint32_t shared, const float* x) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(x) : "memory");
}

// Arrives once what this thread copies in the background has landed.
__forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__forceinline__ void tma_store(const TensorMap* map, uint32_t shared, int x, int y, int z, int w,
                               uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint"
      " [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(map),
      "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy)
      : "memory");
}

// Adds a box of float32 to what is there.
__forceinline__ void tma_add(const TensorMap* map, uint32_t shared, int x, int y, int z, int w) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group"
      " [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

__forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's stores have read their shared memory, which may then be overwritten.
__forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Orders this thread's ordinary writes to shared memory before the copy engine's reads.
__forceinline__ void fence_shared_for_copy_engine() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__forceinline__ float load_shared(uint32_t shared) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(shared));
  return x;
}

__forceinline__ float2 load_shared_pair(uint32_t shared) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(shared));
  return x;
}

__forceinline__ uint4 load_shared_quad(uint32_t shared) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}

__forceinline__ unsigned short load_shared_half(uint32_t shared) {
  unsigned short x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(shared) : "memory");
  return x;
}

__forceinline__ int load_shared_int(uint32_t shared) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(shared) : "memory");
  return x;
}

__forceinline__ void store_shared_quad(uint32_t shared, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

__forceinline__ void store_shared_pair(uint32_t shared, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(x), "f"(y) : "memory");
}

__forceinline__ void store_shared(uint32_t shared, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared), "f"(x) : "memory");
}

// Waits for `threads` threads that name the same number, 1 to 15.
__forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- results ----------------------------------------------------------------------------------

__forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__forceinline__ float bfloat16_to_float(unsigned short bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Stores four 8 x 8 matrices of 16-bit elements; each lane gives the address of one row.
__forceinline__ void stmatrix(uint32_t shared, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(x0), "r"(x1), "r"(x2), "r"(x3)
               : "memory");
}

// The same with each matrix transposed: a lane's address is that of one of its columns.
__forceinline__ void stmatrix_transposed(uint32_t shared, uint32_t x0, uint32_t x1, uint32_t x2,
                                         uint32_t x3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

// ---- clusters, dependent launches, registers --------------------------------------------------

// The value of lane 0, which the compiler then knows to be the same in the whole warp.
__forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(0xffffffff, x, 0); }

// x, but the compiler does not know how it was found, and so cannot find it anew in every loop.
__forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

__forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Together these have the cluster's CTAs wait for each other, and order no more than barriers that
// have been set up: a release would wait for all of a thread's stores.
__forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where the shared memory of another CTA of the cluster has this address.
__forceinline__ uint32_t at_cta(uint32_t shared, int cta_rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(cta_rank));
  return remote;
}

// Writes into another CTA's shared memory, whose barrier counts the bytes when they are there.
__forceinline__ void send(uint32_t remote, uint32_t remote_barrier, const float* x) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, "
      "[%1];" ::"r"(remote),
      "r"(remote_barrier), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
      : "memory");
}

// Blocks until the kernels before this one in the stream have finished and their writes are
// visible.
__forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }

template <int count>
__forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace deepgemm
