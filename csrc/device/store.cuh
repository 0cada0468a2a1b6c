// Writes a warpgroup's accumulators (laid out as in wgmma.cuh) to a row-major matrix: into shared
// memory, and from there by the copy engine or, at an edge, by copy_rows.
#pragma once

#include "device/ptx.cuh"

namespace deepgemm {

// Where 16 bytes of one of a warp's 16 rows are staged, in boxes `box` bytes wide: swizzled as a
// tensor map with such rows expects them.
template <int box>
__forceinline__ uint32_t staged(uint32_t shared, int row, int chunk) {
  const uint32_t offset = row * box + chunk % (box / 16) * 16;
  const uint32_t swizzled = offset ^ (offset >> 7 & box / 16 - 1) << 4;
  return shared + chunk / (box / 16) * (16 * box) + swizzled;
}

// staged(x, row, c ^ chunk), given staged(x, row, c) with c in the first box: what a chunk's bits
// change is the same for all rows.
template <int box>
__forceinline__ uint32_t staged_from(uint32_t first, int chunk) {
  return (first ^ chunk % (box / 16) * 16) + chunk / (box / 16) * (16 * box);
}

// A warp's 16 rows of accumulators, as bfloat16 or as they are.
template <class Staged, int box, int count>
__forceinline__ void stage_rows(const float* sum, uint32_t shared, int lane) {
  if constexpr (sizeof(Staged) == 2) {
    const uint32_t first = staged<box>(shared, lane % 16, lane / 16);
#pragma unroll
    for (int j = 0; j < count / 4; j += 2) {
      const float* x = &sum[4 * j];
      stmatrix(staged_from<box>(first, j), pack_bfloat16(x[0], x[1]), pack_bfloat16(x[2], x[3]),
               pack_bfloat16(x[4], x[5]), pack_bfloat16(x[6], x[7]));
    }
  } else {
    // Half a warp, which has four rows, writes at once. Odd rows' columns change places, lest two
    // rows' are in the same banks.
    constexpr int apart = box == 128 ? 4 : 0;  // chunks
    const bool odd = lane / 4 % 2;
    const uint32_t first = staged<box>(shared, lane / 4, lane % 4 / 2 + odd * apart) + lane % 2 * 8;
#pragma unroll
    for (int j = 0; j < count / 4; ++j) {
      const uint32_t at = staged_from<box>(first, 2 * j);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float *even = &sum[4 * j + 2 * half], *other = &sum[4 * (j ^ apart / 2) + 2 * half];
        store_shared_pair(at + half * (8 * box), odd ? other[0] : even[0],
                          odd ? other[1] : even[1]);
      }
    }
  }
}

// Adds to a warp's 16 rows of accumulators what is staged as they are.
template <class Staged, int box, int count>
__forceinline__ void add_rows(float* sum, uint32_t shared, int lane) {
  constexpr int size = sizeof(Staged);
  const int column = lane % 4 * 2 * size;  // in bytes, of the thread's first two of eight
  const uint32_t first = staged<box>(shared, lane / 4, column / 16) + column % 16;
#pragma unroll
  for (int j = 0; j < count / 4; ++j) {
    const uint32_t at = staged_from<box>(first, j * size / 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* x = &sum[4 * j + 2 * half];
      if constexpr (size == 2) {
        const uint32_t pair = load_shared_int(at + half * (8 * box));
        x[0] += __uint_as_float(pair << 16);
        x[1] += __uint_as_float(pair & 0xffff0000);
      } else {
        const float2 pair = load_shared_pair(at + half * (8 * box));
        x[0] += pair.x;
        x[1] += pair.y;
      }
    }
  }
}

// Writes `rows` rows, `width` columns wide, to d and on, `columns` apart, by a warp and in chunks
// of `size` columns: write(x, row, chunk, j) makes element j of a chunk of what it was, if that is
// wanted. There are no rows if either is negative.
template <int size, class Out, class Write>
__forceinline__ void write_rows(Out* d, int rows, int width, int columns, bool wanted, int lane,
                                Write write) {
  struct alignas(size * sizeof(Out)) Chunk {
    Out x[size];
  };
  const int chunks = ceil_div(max(width, 0), size);
#pragma unroll 1
  for (int i = lane; i < rows * chunks; i += 32) {
    const int row = i / chunks, chunk = i % chunks;
    Out* to = d + static_cast<long long>(row) * columns + chunk * size;
    if (columns % size == 0) {
      Chunk& there = *reinterpret_cast<Chunk*>(to);
      Chunk x;
      if (wanted) x = there;
#pragma unroll
      for (int j = 0; j < size; ++j) write(x.x[j], row, chunk, j);
      there = x;
    } else {
#pragma unroll 1
      for (int j = 0; j < min(size, width - chunk * size); ++j) write(to[j], row, chunk, j);
    }
  }
}

// So the first of the staged rows, or added to what is there.
template <class Staged, int box, class Out>
__forceinline__ void copy_rows(uint32_t shared, Out* d, int rows, int width, int columns,
                               bool accumulate, int lane) {
  constexpr int size = sizeof(Staged);
  write_rows<16 / size>(d, rows, width, columns, accumulate, lane,
                        [&](Out& to, int row, int chunk, int j) {
                          const uint32_t from = staged<box>(shared, row, chunk) + j * size;
                          if constexpr (size == 2) {
                            to = load_shared_half(from);
                          } else if constexpr (sizeof(Out) == 2) {
                            to = pack_bfloat16(bfloat16_to_float(to) + load_shared(from), 0);
                          } else {
                            to = accumulate ? to + load_shared(from) : load_shared(from);
                          }
                        });
}

}  // namespace deepgemm
