// From operands in memory to what the kernel of the indexer's logits takes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/config.h"
#include "jit/tensor_map.h"

namespace deepgemm::attention {

// Without pages, keys [sequences, keys_each, depth] and scales [sequences, keys_each]. With pages,
// keys are [caches, cache_pages, ...], where a page is keys_each keys and then their scales.
struct Operands {
  const void* q;  // [sequences, queries, heads, depth]
  const void* keys;
  const void* scales;
  const float* weights;
  const int *start, *end;  // start: may be null
  const int* pages;        // [sequences, max_pages], or null
  void* logits;            // [sequences, queries, columns]
  uint64_t sequences, queries, heads, depth, columns;
  uint64_t keys_each, caches, cache_pages, max_pages;
  bool out_float32, compressed, clean;
};

// A tensor of bytes of which a row fills one of shared memory.
inline TensorMap byte_map(const void* address, uint64_t row, uint64_t rows, uint64_t matrices,
                          uint64_t matrix_stride, uint32_t box_rows, uint32_t box_matrices) {
  return jit::tensor_map(address, jit::CU_TENSOR_MAP_DATA_TYPE_UINT8, {row, rows, matrices},
                         {row, matrix_stride}, {kRowBytes, box_rows, box_matrices},
                         jit::CU_TENSOR_MAP_SWIZZLE_128B);
}

// Of rows of scales, a row or part of one at a time.
inline TensorMap scale_map(const void* address, uint64_t count, uint64_t rows, uint64_t stride,
                           uint32_t box) {
  return jit::tensor_map(address, jit::CU_TENSOR_MAP_DATA_TYPE_FLOAT32, {count, rows, 1},
                         {stride, stride * rows}, {box, 1, 1}, jit::CU_TENSOR_MAP_SWIZZLE_NONE);
}

inline Params params_of(const Config& config, int ctas, const Operands& x) {
  Params p = {};
  // A single query lies as it is, whatever the number of its heads.
  const uint32_t abreast = config.abreast();
  const uint32_t some = abreast == 1 ? config.heads : config.heads_abreast();
  p.q = jit::tensor_map(x.q, jit::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                        {x.depth, std::min<uint64_t>(some, x.heads), x.sequences * x.queries,
                         (x.heads + some - 1) / some},
                        {x.depth, x.heads * x.depth, some * x.depth},
                        {kRowBytes, some, abreast, config.heads / some},
                        jit::CU_TENSOR_MAP_SWIZZLE_128B);
  p.weights = x.weights;
  p.start = x.start;
  p.end = x.end;
  p.pages = x.pages;
  p.logits = x.logits;
  p.sequences = x.sequences;
  p.queries = x.queries;
  p.heads = x.heads;
  p.columns = x.columns;
  p.out_float32 = x.out_float32;
  p.compressed = x.compressed;
  p.clean = x.clean;
  if (x.pages) {
    const uint64_t page_bytes = x.keys_each * (x.depth + 4), pages = x.caches * x.cache_pages;
    p.keys = byte_map(x.keys, x.depth, x.keys_each, pages, page_bytes, x.keys_each, 1);
    p.scales = scale_map(static_cast<const char*>(x.keys) + x.keys_each * x.depth, x.keys_each,
                         pages, page_bytes, x.keys_each);
    p.page_keys = x.keys_each;
    p.max_pages = x.max_pages;
    p.cache_pages = x.cache_pages;
    p.by_sharers = Divisor::of(x.sequences / x.caches);
    p.keys_end = std::min(x.columns, x.max_pages * x.keys_each);
  } else {
    const uint64_t count = x.sequences * x.keys_each;
    p.page_keys = kTileKeys;
    p.keys = byte_map(x.keys, x.depth, count, 1, count * x.depth, p.page_keys, 1);
    // The copy engine wants strides that are multiples of 16, of a single row too.
    p.scales = scale_map(x.scales, count, 1, (count * 4 + 15) / 16 * 16, kScaleBox);
    p.keys_end = x.keys_each;
  }
  p.by_blocks = Divisor::of(ceil_div(p.queries, config.block_queries()));
  p.by_ctas = Divisor::of(ctas);
  p.by_page_keys = Divisor::of(p.page_keys);
  return p;
}

}  // namespace deepgemm::attention
