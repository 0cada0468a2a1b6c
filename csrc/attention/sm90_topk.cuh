// indices[r], scores[r] = the k largest logits of row r, the best first, and of equals the one with
// the smaller index. -1 and -inf where there are fewer than k that are not -inf.
//
// Each logit and its index make a number that orders as they should (numbered). The k-th largest is
// found a digit at a time, from the top: count how many of the candidates, which agree with it so
// far, have each digit. At last the k are sorted.
//
// Candidates are in shared memory: all of the row that are as large as, by a sample of it, somewhat
// more than k should be. Where these are too many or too few, the first digits are found in the row
// itself. So nothing depends on the sample, nor on the order of the atomics.
//
// Grid: one CTA a row.
#pragma once

#include "attention/config.h"
#include "device/sums.cuh"

namespace deepgemm::attention {

constexpr TopkConfig config{CONFIG};

constexpr int kThreads = TopkConfig::kThreads;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMost = 4096;  // candidates in shared memory, or elements of a sample
constexpr int kIndexBits = 31;
constexpr uint32_t kMinusInfinity = 0x007fffff;  // as ordered() has it
constexpr int kSize = config.float32 ? 4 : 2;
constexpr int kTogether = 16 / kSize;  // elements of a load

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

// The bits of a float, so that they order as the floats do; NaN, of either sign, is the largest.
__forceinline__ uint32_t ordered(uint32_t bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) return 0xffffffff;
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

__forceinline__ uint64_t numbered(uint32_t bits, int index) {
  return uint64_t(ordered(bits)) << kIndexBits | 0x7fffffff - index;
}

// A row, in loads of 16 bytes but for what is not aligned. Its functions call f(bits, index).
struct Row {
  const char* begin;
  int columns, head, vectors;

  __forceinline__ Row(const void* logits, long long number, int columns)
      : begin(static_cast<const char*>(logits) + number * columns * kSize),
        columns(columns),
        head(min(columns, static_cast<int>(-uint64_t(begin) % 16 / kSize))),
        vectors((columns - head) / kTogether) {}

  template <class F>
  __forceinline__ void element(int i, F f) const {
    if constexpr (config.float32) {
      f(reinterpret_cast<const uint32_t*>(begin)[i], i);
    } else {
      f(reinterpret_cast<const unsigned short*>(begin)[i] << 16, i);
    }
  }

  template <class F>
  __forceinline__ void vector(int v, F f) const {
    const uint4 x = reinterpret_cast<const uint4*>(begin + head * kSize)[v];
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const uint32_t bits = config.float32 ? words[i] : words[i / 2] << 16 * (1 - i % 2);
      f(config.float32 ? bits : bits & 0xffff0000, head + v * kTogether + i);
    }
  }

  template <class F>
  __forceinline__ void each(F f) const {
    if (threadIdx.x < head) element(threadIdx.x, f);
#pragma unroll 2
    for (int v = threadIdx.x; v < vectors; v += kThreads) vector(v, f);
    const int tail = head + vectors * kTogether + threadIdx.x;
    if (tail < columns) element(tail, f);
  }
};

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
  int above = search.above + sum_before<kThreads>(sum, s.sums, total);
  wanted = min(wanted, search.above + total);
  if (above < wanted && wanted <= above + sum) {
    for (; above + s.bins[digit] < wanted; --digit) above += s.bins[digit];
    s.found = {search.prefix << width | uint64_t(digit), shift, above, s.bins[digit]};
  }
  __syncthreads();
  search = s.found;
}

// Puts numbers into shared memory, as many as there is room for, and returns how many there are.
// `each(f)` calls f with all of them.
template <class Each>
__forceinline__ int collect(Shared& s, Each each) {
  __syncthreads();
  s.kept = 0;
  __syncthreads();
  each([&](uint64_t number) {
    const int at = atomicAdd(&s.kept, 1);
    if (at < kMost) s.numbers[at] = number;
  });
  __syncthreads();
  return s.kept;
}

// Finds the first digits of the last number wanted of the `kept` that were collected, so many that
// no more than these begin with them.
__forceinline__ void search_kept(Shared& s, Search& search, int& wanted, int kept) {
  while (search.left() > wanted) {
    find_digit(s, search, wanted, [&](auto f) {
      for (int i = threadIdx.x; i < kept; i += kThreads) f(s.numbers[i]);
    });
  }
}

// A logit, as ordered() has it, that somewhat more than k of the row should reach.
__forceinline__ uint32_t reached_by_few(Shared& s, const Row& row, int k) {
  constexpr int loads = kMost / kTogether;
  if (row.vectors < loads) return kMinusInfinity + 1;
  const int sampled = collect(s, [&](auto f) {
    for (int i = threadIdx.x; i < loads; i += kThreads) {
      row.vector(static_cast<long long>(i) * row.vectors / loads, [&](uint32_t bits, int index) {
        if (ordered(bits) > kMinusInfinity) f(numbered(bits, index));
      });
    }
  });
  // Of k, so many are expected in the sample, with a standard deviation of the root of that.
  const float expected = static_cast<float>(k) * kMost / row.columns;
  int wanted = expected + 3 * sqrtf(expected) + 2;
  if (wanted >= sampled) return kMinusInfinity + 1;
  Search search;
  search.count = sampled;
  search_kept(s, search, wanted, sampled);
  return search.prefix << search.shift >> kIndexBits;
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
  let_next_kernel_start();
  wait_for_previous_kernel();

  const Row row(p.logits, blockIdx.x, p.columns);
  const auto each_from = [&](uint32_t least, auto f) {
    row.each([&](uint32_t bits, int index) {
      if (ordered(bits) >= least) f(numbered(bits, index));
    });
  };
  Search search;
  int wanted = p.k;
  const uint32_t least = reached_by_few(s, row, p.k);
  int kept = collect(s, [&](auto f) { each_from(least, f); });
  if (kept <= kMost && (kept >= wanted || least == kMinusInfinity + 1)) {
    wanted = min(wanted, kept);
    search.count = kept;
  } else {
    const auto each_of_row = [&](auto f) { each_from(kMinusInfinity + 1, f); };
    do {
      find_digit(s, search, wanted, each_of_row);
    } while (search.left() > kMost);
    kept = collect(s, [&](auto f) {
      each_of_row([&](uint64_t number) {
        if (search.keeps(number)) f(number);
      });
    });
  }
  search_kept(s, search, wanted, kept);

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

  const long long first = static_cast<long long>(blockIdx.x) * p.k;  // of the row's results
  for (int i = threadIdx.x; i < p.k; i += kThreads) {
    const uint64_t number = i < wanted ? s.numbers[i] : 0;
    const uint32_t key = number ? number >> kIndexBits : kMinusInfinity;
    const uint32_t bits = key & 0x80000000 ? key ^ 0x80000000 : ~key;
    p.indices[first + i] = number ? static_cast<int>(~number & 0x7fffffff) : -1;
    if constexpr (config.float32) {
      static_cast<uint32_t*>(p.scores)[first + i] = bits;
    } else {
      static_cast<unsigned short*>(p.scores)[first + i] = bits >> 16;
    }
  }
}

}  // namespace deepgemm::attention
