// Of h = (gate, up), both y = w f(gate) up, f being silu, and h itself for the backward pass:
// FP8(y / scale) and FP8(h / scale), each with a scale for 128 columns of a row.
//
// A warp takes a block of 128 columns of gate, up and y in 8 rows, 16 lanes x 8 columns for each
// of four: all loads first, then y, then the scales and the stores.
#pragma once

#include "quantize/activation.cuh"
#include "quantize/vector.cuh"
#include "training/config.h"

namespace deepgemm::training {

using quantize::kVector;

constexpr SwigluForward config{CONFIG};

constexpr int kRows = SwigluForward::kRowsPerWarp / 2;  // of each half
constexpr int kCtas = 3;                                // a multiprocessor

using Input = quantize::Vector<false>;

struct Rows {
  const SwigluForwardParams& p;
  int block, row0;

  __forceinline__ int lane() const { return threadIdx.x % 16; }
  __forceinline__ bool valid(int row) const { return row0 + row < p.m; }
  // Where a row's eight elements are in a matrix that is so wide.
  __forceinline__ long long at(int row, int width) const {
    return (long long)(row0 + row) * width + block * kBlock + lane() * kVector;
  }

  // Rows x, of which amax[i] is the lane's largest magnitude in row i, to a matrix that is `width`
  // wide, and their scales.
  template <class Row>
  __forceinline__ void quantise(const Row (&x)[kRows], const float (&amax)[kRows],
                                unsigned char* data, int width, float* scales) const {
    // Of row lane % kRows.
    const float scale = quantize::scale_of<false>(quantize::reduce_over_16_lanes(amax, larger), 0);
    const float reciprocal = __frcp_rn(scale);
    if (lane() < kRows && valid(lane())) scales[row0 + lane()] = scale;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float of_row = __shfl_sync(0xffffffff, reciprocal, row, 16);
      const uint2 bytes = quantize::quantised<false>(x[row], [&](int) { return of_row; });
      if (valid(row)) store_result(data + at(row, width), bytes);
    }
  }

  __forceinline__ void run() const {
    const auto* x = static_cast<const Input::Element*>(p.h);
    const uint64_t policy = policy_of_reads(config.bytes(p));
    Input h[2][kRows];
    float weight[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      weight[row] = 1;
      if (!valid(row)) continue;
      h[0][row].load(x + at(row, 2 * p.k), policy);
      h[1][row].load(x + at(row, 2 * p.k) + p.k, policy);
      if (p.weights) weight[row] = p.weights[row0 + row];
    }

    float y[kRows][kVector], amax[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const quantize::Activated f = quantize::activate<quantize::kSilu>(h[0][row][i]);
        y[row][i] = f.value * h[1][row][i] * weight[row];
        amax[row] = i ? larger(amax[row], y[row][i]) : y[row][i];
      }
    }
    quantise(y, amax, p.y, p.k, p.y_scale + (long long)block * p.m);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) amax[row] = h[half][row].amax();
      quantise(h[half], amax, p.kept + half * p.k, 2 * p.k,
               p.kept_scale + (long long)(block + half * p.blocks()) * p.m);
    }
  }
};

}  // namespace deepgemm::training

extern "C" __global__ void __launch_bounds__(deepgemm::training::config.threads(),
                                             deepgemm::training::kCtas)
    kernel(const __grid_constant__ deepgemm::training::SwigluForwardParams p) {
  using namespace deepgemm::training;
  deepgemm::wait_for_previous_kernel();
  deepgemm::let_next_kernel_start();
  const int warp = (blockIdx.x * config.threads() + threadIdx.x) / 32;
  const int along_m = p.by_blocks(warp), block = warp - along_m * p.blocks();
  const int rows = along_m * SwigluForward::kRowsPerWarp;
  if (rows >= p.m) return;
  Rows{p, block, rows + int(threadIdx.x) / 16 % 2 * kRows}.run();
}
