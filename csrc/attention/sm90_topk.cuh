// indices[r], scores[r] = the k largest logits of row r, the best first, and of equals the one with
// the smaller index. -1 and -inf where there are fewer than k that are not -inf.
//
// Each logit and its index make a number that orders as they should (numbered). The k-th largest is
// found a digit at a time, from the top: count how many of the candidates, which agree with it so
// far, have each digit. When few enough are left they move to shared memory, where the rest of the
// digits are found, and at last the k are sorted. Nothing depends on the order of the atomics.
//
// Grid: one CTA a row. The row is read from memory once and then, mostly, from L2.
#pragma once

#include "attention/config.h"
#include "device/ptx.cuh"

namespace deepgemm::attention {

constexpr TopkConfig config{CONFIG};

constexpr int kThreads = TopkConfig::kThreads;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMost = 4096;  // candidates in shared memory
constexpr int kIndexBits = 31;
constexpr uint32_t kMinusInfinity = 0x007fffff;  // as ordered() has it

// What is known of the last of the numbers wanted: its first bits, all but `shift` of them. `count`
// numbers begin with these, the candidates, and `above` numbers are larger.
struct Search {
  uint64_t prefix = 0;
  int shift = 32 + kIndexBits;
  int above = 0, count = 0;

  __forceinline__ int left() const { return above + count; }
  __forceinline__ bool keeps(uint64_t number) const { return number >> shift >= prefix; }
};

struct Shared {
  uint64_t numbers[kMost];
  int bins[kBins];
  int sums[kThreads / 32];
  int kept;
  Search found;
};

static_assert(sizeof(Shared) <= TopkConfig::kSmemBytes);

// The bits of a float, so that they order as the floats do.
__forceinline__ uint32_t ordered(uint32_t bits) {
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

__forceinline__ uint64_t numbered(uint32_t bits, int index) {
  return uint64_t(ordered(bits)) << kIndexBits | 0x7fffffff - index;
}

// Calls f(bits, index) for every element of a row, 16 bytes at a time but for what is not aligned.
template <class F>
__forceinline__ void for_each(const void* logits, long long row, int columns, F f) {
  constexpr int size = config.float32 ? 4 : 2, together = 16 / size;
  const char* begin = static_cast<const char*>(logits) + row * columns * size;
  const int head = min(columns, static_cast<int>(-uint64_t(begin) % 16 / size));
  const int vectors = (columns - head) / together;
  const auto one = [&](int i) {
    if constexpr (config.float32) {
      f(reinterpret_cast<const uint32_t*>(begin)[i], i);
    } else {
      f(reinterpret_cast<const unsigned short*>(begin)[i] << 16, i);
    }
  };
  if (threadIdx.x < head) one(threadIdx.x);
#pragma unroll 2
  for (int v = threadIdx.x; v < vectors; v += kThreads) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(begin + head * size) + v);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const uint32_t bits = config.float32 ? words[i] : words[i / 2] << 16 * (1 - i % 2);
      f(config.float32 ? bits : bits & 0xffff0000, head + v * together + i);
    }
  }
  const int tail = head + vectors * together + threadIdx.x;
  if (tail < columns) one(tail);
}

// The sum of the values of all threads before this one, and of all.
__forceinline__ int sum_before(int x, int* sums, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(0xffffffff, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int before = sum - x;
  total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i == warp) before += total;
    total += sums[i];
  }
  return before;
}

// Finds the next digit. `each(f)` calls f with all numbers, and those that are no candidates if it
// likes; fewer than are wanted at the first digit are all that there are.
template <class Each>
__forceinline__ void find_digit(Shared& s, Search& search, int& wanted, Each each) {
  const int width = min(kDigitBits, search.shift), shift = search.shift - width;
  for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
  __syncthreads();
  each([&](uint64_t number) {
    if (number >> search.shift == search.prefix)
      atomicAdd(&s.bins[static_cast<uint32_t>(number >> shift) & ((1 << width) - 1)], 1);
  });
  __syncthreads();

  // Each thread has a few digits, the largest the first thread.
  constexpr int own = kBins / kThreads;
  int digit = kBins - 1 - static_cast<int>(threadIdx.x) * own;
  int sum = 0, total;
#pragma unroll
  for (int i = 0; i < own; ++i) sum += s.bins[digit - i];
  int above = search.above + sum_before(sum, s.sums, total);
  wanted = min(wanted, search.above + total);
  if (above < wanted && wanted <= above + sum) {
    for (; above + s.bins[digit] < wanted; --digit) above += s.bins[digit];
    s.found = {search.prefix << width | uint64_t(digit), shift, above, s.bins[digit]};
  }
  __syncthreads();
  search = s.found;
}

// Sorts numbers, a power of two of them, the largest first: a bitonic network, in which a pair is
// compared by the same warp as all others of its 64 numbers.
__forceinline__ void sort(uint64_t* numbers, int count) {
  for (int run = 2; run <= count; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < count / 2; i += kThreads) {
        const int at = 2 * i - i % distance;
        const uint64_t x = numbers[at], y = numbers[at + distance];
        if (x < y == !(at & run)) {
          numbers[at] = y;
          numbers[at + distance] = x;
        }
      }
      const int next = distance > 1 ? distance / 2 : run;
      if (max(distance, next) > 32) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, TopkConfig::kCtas)
    kernel(const TopkParams p) {
  extern __shared__ __align__(16) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const long long row = blockIdx.x;
  let_next_kernel_start();
  wait_for_previous_kernel();

  const auto each_of_row = [&](auto f) {
    for_each(p.logits, row, p.columns, [&](uint32_t bits, int index) {
      if (ordered(bits) > kMinusInfinity) f(numbered(bits, index));
    });
  };
  Search search;
  int wanted = p.k;
  s.found = {};  // by all, in case that there is nothing to be found
  do {
    find_digit(s, search, wanted, each_of_row);
  } while (search.left() > kMost);

  s.kept = 0;
  __syncthreads();
  if (wanted > 0) {
    each_of_row([&](uint64_t number) {
      if (search.keeps(number)) s.numbers[atomicAdd(&s.kept, 1)] = number;
    });
  }
  const int kept = search.left();
  const auto each_kept = [&](auto f) {
    for (int i = threadIdx.x; i < kept; i += kThreads) f(s.numbers[i]);
  };
  __syncthreads();
  while (search.left() > wanted) find_digit(s, search, wanted, each_kept);

  // Those that remain move to the front; zeros, which are less than any number, fill up the rest.
  uint64_t own[kMost / kThreads];
#pragma unroll
  for (int i = 0; i < kMost / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x;
    own[i] = at < kept && search.keeps(s.numbers[at]) ? s.numbers[at] : 0;
  }
  __syncthreads();
  s.kept = 0;
  const int sorted = wanted < 2 ? 2 : 2 << (31 - __clz(wanted - 1));
  for (int i = threadIdx.x; i < sorted; i += kThreads) s.numbers[i] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMost / kThreads; ++i) {
    if (own[i]) s.numbers[atomicAdd(&s.kept, 1)] = own[i];
  }
  __syncthreads();
  sort(s.numbers, sorted);
  __syncthreads();

  for (int i = threadIdx.x; i < p.k; i += kThreads) {
    const uint64_t number = i < wanted ? s.numbers[i] : 0;
    const uint32_t key = number ? number >> kIndexBits : kMinusInfinity;
    const uint32_t bits = key & 0x80000000 ? key ^ 0x80000000 : ~key;
    p.indices[row * p.k + i] = number ? static_cast<int>(~number & 0x7fffffff) : -1;
    if constexpr (config.float32) {
      static_cast<uint32_t*>(p.scores)[row * p.k + i] = bits;
    } else {
      static_cast<unsigned short*>(p.scores)[row * p.k + i] = bits >> 16;
    }
  }
}

}  // namespace deepgemm::attention
