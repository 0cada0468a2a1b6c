// Warpgroup matrix multiply: D[64, N] (+)= A[64, K] * B[N, K]^T on operands in shared memory, FP32
// in registers. K is 32 bytes: 32 elements of FP8, 16 of bfloat16.
//
// A thread of the warpgroup holds, for each chunk j of eight columns, d[4j .. 4j+3]:
//   row 16 * warp + lane / 4      columns 8j + 2 * (lane % 4) + {0, 1}
//   row 16 * warp + lane / 4 + 8  the same columns
#pragma once

#include "device/ptx.cuh"

namespace deepgemm {

// An address as descriptors have it, in units of 16 bytes. In a cluster, the bits above name its
// CTA.
__forceinline__ uint64_t described(uint32_t shared) { return (shared & 0x3ffff) >> 4; }

// Describes a tile of 128-byte rows with the 128-byte swizzle, as the copy engine writes it; it
// starts at a multiple of 1024 bytes.
//
// K-major: a row is of M or N. Adding 2 moves 32 bytes along K.
// MN-major: a row is of K and holds 64 of M or N; the next 64 are `box_bytes` further. Adding 128
// moves 16 rows along K.
__forceinline__ uint64_t tile_descriptor(uint32_t shared, uint32_t box_bytes = 0) {
  constexpr uint64_t swizzle_128b = 1ull << 62;
  constexpr uint64_t eight_rows = (1024ull >> 4) << 32;
  return swizzle_128b | eight_rows | static_cast<uint64_t>(box_bytes >> 4) << 16 |
         described(shared);
}

// The same of rows of 32 bytes, with the 32-byte swizzle, K-major; it starts at a multiple of 256.
__forceinline__ uint64_t narrow_tile_descriptor(uint32_t shared) {
  constexpr uint64_t swizzle_32b = 3ull << 62, eight_rows = (256ull >> 4) << 32;
  return swizzle_32b | eight_rows | described(shared);
}

__forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most so many of the groups committed last are in flight.
template <int in_flight>
__forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(in_flight) : "memory");
}

// Keeps the compiler from moving uses of registers that a wgmma in flight owns.
template <int count>
__forceinline__ void pin(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Zeroes registers here and nowhere else: of a branch around it the compiler would make a selection
// for each, taken or not.
template <int count>
__forceinline__ void clear(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i]));
}

// An inline assembly statement names each register, so each width is a statement of its own; the
// macros below write the lists. R* are the operands' names, D* bind them, eight columns (four
// registers) at a time.
#define DEEPGEMM_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DEEPGEMM_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define DEEPGEMM_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define DEEPGEMM_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define DEEPGEMM_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define DEEPGEMM_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define DEEPGEMM_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define DEEPGEMM_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define DEEPGEMM_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define DEEPGEMM_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define DEEPGEMM_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define DEEPGEMM_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define DEEPGEMM_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define DEEPGEMM_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define DEEPGEMM_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define DEEPGEMM_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define DEEPGEMM_D(c)                                                                             \
  "+f"(d[8 * c]), "+f"(d[8 * c + 1]), "+f"(d[8 * c + 2]), "+f"(d[8 * c + 3]), "+f"(d[8 * c + 4]), \
      "+f"(d[8 * c + 5]), "+f"(d[8 * c + 6]), "+f"(d[8 * c + 7])

#define DEEPGEMM_R_half "%0, %1, %2, %3"
#define DEEPGEMM_D_half "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define DEEPGEMM_R_1 DEEPGEMM_R0
#define DEEPGEMM_D_1 DEEPGEMM_D(0)
#define DEEPGEMM_R_2 DEEPGEMM_R_1 ", " DEEPGEMM_R1
#define DEEPGEMM_D_2 DEEPGEMM_D_1, DEEPGEMM_D(1)
#define DEEPGEMM_R_3 DEEPGEMM_R_2 ", " DEEPGEMM_R2
#define DEEPGEMM_D_3 DEEPGEMM_D_2, DEEPGEMM_D(2)
#define DEEPGEMM_R_4 DEEPGEMM_R_3 ", " DEEPGEMM_R3
#define DEEPGEMM_D_4 DEEPGEMM_D_3, DEEPGEMM_D(3)
#define DEEPGEMM_R_5 DEEPGEMM_R_4 ", " DEEPGEMM_R4
#define DEEPGEMM_D_5 DEEPGEMM_D_4, DEEPGEMM_D(4)
#define DEEPGEMM_R_6 DEEPGEMM_R_5 ", " DEEPGEMM_R5
#define DEEPGEMM_D_6 DEEPGEMM_D_5, DEEPGEMM_D(5)
#define DEEPGEMM_R_7 DEEPGEMM_R_6 ", " DEEPGEMM_R6
#define DEEPGEMM_D_7 DEEPGEMM_D_6, DEEPGEMM_D(6)
#define DEEPGEMM_R_8 DEEPGEMM_R_7 ", " DEEPGEMM_R7
#define DEEPGEMM_D_8 DEEPGEMM_D_7, DEEPGEMM_D(7)
#define DEEPGEMM_R_9 DEEPGEMM_R_8 ", " DEEPGEMM_R8
#define DEEPGEMM_D_9 DEEPGEMM_D_8, DEEPGEMM_D(8)
#define DEEPGEMM_R_10 DEEPGEMM_R_9 ", " DEEPGEMM_R9
#define DEEPGEMM_D_10 DEEPGEMM_D_9, DEEPGEMM_D(9)
#define DEEPGEMM_R_11 DEEPGEMM_R_10 ", " DEEPGEMM_R10
#define DEEPGEMM_D_11 DEEPGEMM_D_10, DEEPGEMM_D(10)
#define DEEPGEMM_R_12 DEEPGEMM_R_11 ", " DEEPGEMM_R11
#define DEEPGEMM_D_12 DEEPGEMM_D_11, DEEPGEMM_D(11)
#define DEEPGEMM_R_13 DEEPGEMM_R_12 ", " DEEPGEMM_R12
#define DEEPGEMM_D_13 DEEPGEMM_D_12, DEEPGEMM_D(12)
#define DEEPGEMM_R_14 DEEPGEMM_R_13 ", " DEEPGEMM_R13
#define DEEPGEMM_D_14 DEEPGEMM_D_13, DEEPGEMM_D(13)
#define DEEPGEMM_R_15 DEEPGEMM_R_14 ", " DEEPGEMM_R14
#define DEEPGEMM_D_15 DEEPGEMM_D_14, DEEPGEMM_D(14)
#define DEEPGEMM_R_16 DEEPGEMM_R_15 ", " DEEPGEMM_R15
#define DEEPGEMM_D_16 DEEPGEMM_D_15, DEEPGEMM_D(15)

// `n` columns in `c` lists of eight registers; the operands after them are number i0, i1 and i2.
#define DEEPGEMM_WGMMA(types, majors, n, c, i0, i1, i2)                         \
  if constexpr (columns == n)                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                         \
               ", 0;\n"                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #n types " {" DEEPGEMM_R_##c \
               "}, %" #i0 ", %" #i1 ", p, 1, 1" majors ";\n}"                   \
               : DEEPGEMM_D_##c                                                 \
               : "l"(a), "l"(b), "r"(accumulate))

#define DEEPGEMM_WGMMA_WIDTHS(types, majors)             \
  DEEPGEMM_WGMMA(types, majors, 8, half, 4, 5, 6);       \
  DEEPGEMM_WGMMA(types, majors, 16, 1, 8, 9, 10);        \
  DEEPGEMM_WGMMA(types, majors, 32, 2, 16, 17, 18);      \
  DEEPGEMM_WGMMA(types, majors, 48, 3, 24, 25, 26);      \
  DEEPGEMM_WGMMA(types, majors, 64, 4, 32, 33, 34);      \
  DEEPGEMM_WGMMA(types, majors, 80, 5, 40, 41, 42);      \
  DEEPGEMM_WGMMA(types, majors, 96, 6, 48, 49, 50);      \
  DEEPGEMM_WGMMA(types, majors, 112, 7, 56, 57, 58);     \
  DEEPGEMM_WGMMA(types, majors, 128, 8, 64, 65, 66);     \
  DEEPGEMM_WGMMA(types, majors, 144, 9, 72, 73, 74);     \
  DEEPGEMM_WGMMA(types, majors, 160, 10, 80, 81, 82);    \
  DEEPGEMM_WGMMA(types, majors, 176, 11, 88, 89, 90);    \
  DEEPGEMM_WGMMA(types, majors, 192, 12, 96, 97, 98);    \
  DEEPGEMM_WGMMA(types, majors, 208, 13, 104, 105, 106); \
  DEEPGEMM_WGMMA(types, majors, 224, 14, 112, 113, 114); \
  DEEPGEMM_WGMMA(types, majors, 240, 15, 120, 121, 122); \
  DEEPGEMM_WGMMA(types, majors, 256, 16, 128, 129, 130)

// D (+)= A * B^T for one step of K, asynchronously; `accumulate` = 0 overwrites D.
template <int columns, int a_type = kE4M3, int b_type = kE4M3, bool a_mn_major = false,
          bool b_mn_major = false>
__forceinline__ void wgmma(float (&d)[columns / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(columns == 8 || columns % 16 == 0 && columns >= 16 && columns <= 256);
  static_assert((a_type == kBfloat16) == (b_type == kBfloat16));
  static_assert(a_type == kBfloat16 || !a_mn_major && !b_mn_major);
  if constexpr (a_type == kE4M3 && b_type == kE4M3) {
    DEEPGEMM_WGMMA_WIDTHS("k32.f32.e4m3.e4m3", "");
  } else if constexpr (a_type == kE4M3 && b_type == kE5M2) {
    DEEPGEMM_WGMMA_WIDTHS("k32.f32.e4m3.e5m2", "");
  } else if constexpr (a_type == kE5M2 && b_type == kE4M3) {
    DEEPGEMM_WGMMA_WIDTHS("k32.f32.e5m2.e4m3", "");
  } else if constexpr (a_type == kE5M2 && b_type == kE5M2) {
    DEEPGEMM_WGMMA_WIDTHS("k32.f32.e5m2.e5m2", "");
  } else if constexpr (!a_mn_major && !b_mn_major) {
    DEEPGEMM_WGMMA_WIDTHS("k16.f32.bf16.bf16", ", 0, 0");
  } else if constexpr (!a_mn_major) {
    DEEPGEMM_WGMMA_WIDTHS("k16.f32.bf16.bf16", ", 0, 1");
  } else if constexpr (!b_mn_major) {
    DEEPGEMM_WGMMA_WIDTHS("k16.f32.bf16.bf16", ", 1, 0");
  } else {
    DEEPGEMM_WGMMA_WIDTHS("k16.f32.bf16.bf16", ", 1, 1");
  }
}

#undef DEEPGEMM_WGMMA_WIDTHS
#undef DEEPGEMM_WGMMA

}  // namespace deepgemm
