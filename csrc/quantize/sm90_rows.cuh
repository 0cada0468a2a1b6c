// data[m, n] = FP8(y[m, n] / scale[m, n / 128]),  scale = max over the 128 columns |y| / largest
//
//   cast:       y = x[m, n], by this scale, by one that is given for row m, or by one of all of it
//   activated:  y = w[m] f(x[m, n])
//   gated:      y = w[m] f(x[m, n]) x[m, k + n]
//
// and backward, where d_weights are a block's sums of dy times the rest of y but w,
//
//   activated:  y = w dy f'(x)
//   gated:      y = the gradients of gate and up, of n and k + n:  w dy f'(gate) up,  w dy f(gate)
//
// A warp takes a block of 128 columns in a few rows, half of them for each of its halves:
//
//              16 lanes x 8 columns
//   row 0      lane 0 | 1 | ... | 15
//   ...        the same lanes           all rows' loads first, then their scales, then the stores
//   row 2      lane 16 | ... | 31
//   ...
//
// Neighbouring rows have neighbouring scales, as the GEMM reads them.
#pragma once

#include "quantize/activation.cuh"
#include "quantize/vector.cuh"

namespace deepgemm::quantize {

constexpr RowsConfig config{CONFIG};

constexpr int kInputs = config.inputs();
constexpr int kOutputs = config.outputs();
constexpr int kRows = RowsConfig::kRowsPerWarp / 2;  // of each half

using Input = Vector<config.float32>;

// Eight elements of a row: y from the inputs. Returns the sum of the weight's gradient's terms.
__forceinline__ float compute(const Input (&inputs)[kInputs], float weight,
                              float (&y)[kOutputs][kVector]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    y[0][i] = inputs[0][i];
    if constexpr (config.activates()) {
      const Activated f = activate<config.activation>(inputs[0][i]);
      float up = 1;
      if constexpr (config.gated()) up = inputs[1][i];
      if constexpr (config.backward()) {
        const float dy = inputs[kInputs - 1][i];
        sum += dy * f.value * up;
        y[0][i] = dy * weight * up * f.slope;
        if constexpr (config.gated()) y[1][i] = dy * weight * f.value;
      } else {
        y[0][i] = f.value * up * weight;
      }
    }
  }
  return sum;
}

__forceinline__ void quantise(const RowsParams& p, int block, int row0) {
  const int lane = threadIdx.x % 16;
  const int column = block * kBlock + lane * kVector;
  const auto valid = [&](int row) { return row0 + row < p.m && column < p.k; };
  // Where a row's eight elements are in a matrix that is so many times k wide.
  const auto at = [&](int row, int width) {
    return (long long)row0 * (width * p.k) + column + row * width * p.k;
  };

  const auto* x = static_cast<const Input::Element*>(p.x);
  const auto* dy = static_cast<const Input::Element*>(p.dy);
  const bool owns_row = lane < kRows && row0 + lane < p.m;
  const uint64_t policy = policy_of_reads(config.bytes(p));
  float given = 1;
  if (config.function == kScaled && owns_row) given = p.scale[row0 + lane];
  Input inputs[kRows][kInputs];
  float weight[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    weight[row] = 1;
    if (!valid(row)) continue;
    inputs[row][0].load(x + at(row, config.gated() ? 2 : 1), policy);
    if constexpr (config.gated()) inputs[row][1].load(x + at(row, 2) + p.k, policy);
    if constexpr (config.backward()) inputs[row][kInputs - 1].load(dy + at(row, 1), policy);
    if (config.activates() && p.weights) weight[row] = p.weights[row0 + row];
  }

  float y[kRows][kOutputs][kVector], sums[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) sums[row] = compute(inputs[row], weight[row], y[row]);

#pragma unroll
  for (int output = 0; output < kOutputs; ++output) {
    float scale = given;  // of row lane % kRows
    if constexpr (config.function != kScaled) {
      float amax[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if constexpr (config.function == kCast) {
          amax[row] = inputs[row][0].amax();
        } else {
          amax[row] = y[row][output][0];
#pragma unroll
          for (int i = 1; i < kVector; ++i) amax[row] = larger(amax[row], y[row][output][i]);
        }
      }
      scale = scale_of<config.e5m2>(reduce_over_16_lanes(amax, larger), p.round_up);
      if (owns_row) p.scale[(block + output * p.blocks()) * (long long)p.m + row0 + lane] = scale;
    }
    const float reciprocal = __frcp_rn(scale);
    unsigned char* data = p.data + output * p.k;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float of_row = __shfl_sync(0xffffffff, reciprocal, row, 16);
      const uint2 bytes = quantised<config.e5m2>(y[row][output], [&](int) { return of_row; });
      if (valid(row)) store_result(data + at(row, kOutputs), bytes);
    }
  }
  if constexpr (config.backward()) {
    const float sum = reduce_over_16_lanes(sums, [](float x, float y) { return x + y; });
    if (owns_row) p.d_weights[(row0 + lane) * (long long)p.blocks() + block] = sum;
  }
}

// Casts with one scale a row. A CTA holds a row in registers, or several shorter ones: of each
// thread's vectors, `per_row` neighbours are of one row.
__forceinline__ void quantise_whole_rows(const RowsParams& p) {
  constexpr int kHeld = RowsConfig::kHeld, kWarps = config.threads() / 32;
  const int rows = config.whole_rows(p), per_row = kHeld / rows;
  const int row0 = blockIdx.x * rows;
  const auto for_vectors = [&](auto* array, auto f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int row = row0 + i * rows / kHeld;
      const int column = ((i & (per_row - 1)) * config.threads() + threadIdx.x) * kVector;
      f(i, array + (long long)row * p.k + column, row < p.m && column < p.k);
    }
  };

  const uint64_t policy = policy_of_reads(config.bytes(p));
  Input x[kHeld];
  for_vectors(static_cast<const Input::Element*>(p.x), [&](int i, auto* address, bool valid) {
    if (valid) x[i].load(address, policy);
  });
  __shared__ float of_warps[kWarps][kHeld];
  const int lane = threadIdx.x % 32, own = lane % kHeld;
  float amax[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) amax[i] = x[i].amax();
  float largest = reduce_over_16_lanes(amax, larger);  // of all lanes' vectors `own`
  largest = larger(largest, __shfl_xor_sync(0xffffffff, largest, 16));
  if (lane < kHeld) of_warps[threadIdx.x / 32][lane] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) largest = larger(largest, of_warps[i][own]);
  for (int step = 1; step < per_row; step *= 2) {
    largest = larger(largest, __shfl_xor_sync(0xffffffff, largest, step));
  }
  const float scale = scale_of<config.e5m2>(largest, p.round_up);
  const int row = row0 + own * rows / kHeld;
  if (threadIdx.x < kHeld && (own & (per_row - 1)) == 0 && row < p.m) p.scale[row] = scale;
  const float reciprocal = __frcp_rn(scale);
  for_vectors(p.data, [&](int i, unsigned char* address, bool valid) {
    const float of_row = __shfl_sync(0xffffffff, reciprocal, i);
    const uint2 bytes = quantised<config.e5m2>(x[i], [&](int) { return of_row; });
    if (valid) store_result(address, bytes);
  });
}

}  // namespace deepgemm::quantize

extern "C" __global__ void __launch_bounds__(deepgemm::quantize::config.threads())
    kernel(const __grid_constant__ deepgemm::quantize::RowsParams p) {
  using namespace deepgemm::quantize;
  deepgemm::wait_for_previous_kernel();
  deepgemm::let_next_kernel_start();
  if constexpr (config.function == kWholeRows) return quantise_whole_rows(p);
  const int warp = (blockIdx.x * config.threads() + threadIdx.x) / 32;
  const int along_m = p.by_blocks(warp), block = warp - along_m * p.blocks();
  const int rows = along_m * RowsConfig::kRowsPerWarp;
  if (rows < p.m) quantise(p, block, rows + threadIdx.x / 16 % 2 * kRows);
}
