// What one compiled variant of the indexer's kernels is, and what the host hands to it at launch.
#pragma once

#include "device/types.h"

namespace deepgemm::attention {

// Of shared memory, for each head of a query and for each key: depths of less are filled up with
// zeros.
constexpr int kRowBytes = 128;
constexpr int kTileKeys = 64;  // that a consumer multiplies at once: the rows of wgmma
constexpr int kKeyBytes = kTileKeys * kRowBytes;
// The copy engine wants a load to start at a multiple of 16 bytes, up to three keys before a tile's
// first; otherwise it reports an illegal instruction.
constexpr int kScaleBox = kTileKeys + 4;
constexpr int kScaleBytes = (kScaleBox * 4 + 127) / 128 * 128;

struct Range {
  int begin, end;
};

// What a CTA does at a time: keys for a block of queries of one sequence.
struct Part {
  int sequence;
  int query, queries;  // the first, and how many there are; 0: no more parts
  Range tiles;         // of keys, that are this CTA's
  Range all;           // that any of the queries sees
  int keys_end;        // of the keys that any of them sees
  int edges;           // whether the logits outside of all tiles are this CTA's, too
};

constexpr int kWorkBytes = 256;  // of parts, or of what tells where they begin

struct Config {
  int heads;         // of a query, filled up to a power of two
  int columns;       // of a consumer's product: its queries' heads
  int query_groups;  // consumers with queries of their own
  int key_groups;    // consumers that take the tiles in turn
  int stages;        // depth of the ring of keys

  constexpr int consumers() const { return query_groups * key_groups; }
  constexpr int threads() const { return (consumers() + 1) * 128; }
  constexpr int queries() const { return columns / heads; }  // of a consumer
  constexpr int block_queries() const { return query_groups * queries(); }
  // Queries that share each eight columns of a product, and how many heads each of them has there:
  // so a thread, which holds two of the eight, has heads of one query.
  constexpr int abreast() const { return queries() < 4 ? queries() : 4; }
  constexpr int heads_abreast() const { return 8 / abreast(); }
  constexpr int q_bytes() const { return block_queries() * heads * kRowBytes; }
  constexpr int weight_bytes() const { return block_queries() * heads * 4; }
  // Queries have two slots, so that the next ones arrive while these are at work.
  constexpr int smem_bytes() const {
    return 2 * (q_bytes() + weight_bytes()) + stages * (kKeyBytes + kScaleBytes) + kWorkBytes +
           (2 + stages) * 2 * 8;
  }
};

// Queries are numbered through all sequences, each of which has its own keys and as many queries as
// any other.
struct Params {
  TensorMap q;           // bytes [heads / some, sequences * queries, some, depth]
  TensorMap keys;        // bytes [pages, page_keys, depth], or [1, sequences * keys, depth]
  TensorMap scales;      // float32, without the last dim
  const float* weights;  // [sequences * queries, heads]
  const int* start;      // [sequences * queries]: a query's first key; null: 0
  const int* end;        // [sequences * queries]
  const int* pages;      // [sequences, max_pages]: where a sequence's keys are; null: in order
  void* logits;          // [sequences * queries, columns]
  int sequences, queries, heads;
  int keys_end;       // the most keys that a sequence has
  int columns;        // of a row of logits
  int page_keys;      // keys of one load
  int max_pages;      // of a sequence
  int cache_pages;    // that a cache has
  int out_float32;    // logits are float32, otherwise bfloat16
  int compressed;     // column 0 is a query's first key, otherwise key 0
  int clean;          // what a query does not see is -inf, otherwise unspecified
  Divisor by_blocks;  // of a sequence's queries
  Divisor by_ctas, by_page_keys;
  Divisor by_sharers;  // sequences that share a cache
};

struct TopkConfig {
  int float32;  // logits are, otherwise they are bfloat16

  static constexpr int kThreads = 512;
  static constexpr int kCtas = 3;  // on a multiprocessor
  static constexpr int kSmemBytes = 42 * 1024;
};

struct TopkParams {
  const void* logits;  // [rows, columns]
  int* indices;        // [rows, k]
  void* scores;        // [rows, k]
  int columns, k;
};

}  // namespace deepgemm::attention
