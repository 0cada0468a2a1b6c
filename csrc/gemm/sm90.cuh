// D[M, N] (+)= sum over blocks kb of 128 along K:
//   a_scale[m, kb] * b_scale[n / 128, kb] * (A[m, kb] . B[n, kb])        (kBlocks; see Scales)
// for one problem, for a batch, or for groups that are found on the device (see Groups).
//
//   copy thread   tiles of A and B, C   \                         consumer 0: the first rows
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

#include "gemm/sm90_consumer.cuh"
#include "gemm/sm90_producer.cuh"

namespace deepgemm::gemm {

constexpr int kProducerRegisters = config.consumers == 2 && config.scales != kChannels ? 40 : 56;
constexpr int kConsumerRegisters = consumer_registers(config.consumers, kProducerRegisters);
// One consumer gets enough from the launch.
constexpr bool kMoveRegisters = config.consumers > 1;

extern "C" __global__ void __launch_bounds__(config.threads(), 1)
    kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char memory[];
  const Ring ring(uniform(shared_address(memory)));
  const int warp = uniform(threadIdx.x / 32);

  if (warp == 0 && elect_one()) {
    prefetch(&params.a);
    prefetch(&params.b);
    for (Ring slot = ring; slot.parity == 0; slot.advance()) {
      barrier_init(slot.full(), config.scales == kNoScales ? 1 : 1 + kScaleWarps);
      barrier_init(slot.empty(), config.cluster() * config.consumers * 4);  // each consumer warp
    }
    fence_barrier_init();
  }
  if constexpr (config.cluster() > 1) {
    cluster_arrive();
  } else {
    __syncthreads();
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  if constexpr (config.cluster() > 1) cluster_wait();

  if (warp / 4 == config.consumers) {
    if constexpr (kMoveRegisters) shrink_registers<kProducerRegisters>();
    if (warp % 4 == 0) {
      if (elect_one()) copy_tiles(params, ring);
    } else if (config.scales != kNoScales && warp % 4 <= kScaleWarps) {
      const int thread = threadIdx.x % 128 - 32;
      if constexpr (config.scales == kBlocks) {
        copy_scales<LaneScales>(params, ring, thread);
      } else if constexpr (config.scales == kRows) {
        copy_scales<LaneRows>(params, ring, thread);
      } else if constexpr (config.scales == kChannels) {
        LaneFactors::clear(ring, thread);
        copy_scales<LaneFactors>(params, ring, thread);
      }
    }
  } else {
    if constexpr (kMoveRegisters) grow_registers<kConsumerRegisters>();
    consume(params, ring, warp / 4);
  }
}

}  // namespace deepgemm::gemm
