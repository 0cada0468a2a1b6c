// Which keys a CTA scores for which queries.
//
// A sequence's queries are taken `block_queries` at a time. The keys that any query of a block sees
// are cut into tiles of `kTileKeys`; one unit of work more is what lies outside the tiles, which
// only has to be filled. All units, block after block, are divided evenly among the CTAs, whatever
// the starts and ends on the device are.
#pragma once

#include "attention/config.h"
#include "device/sums.cuh"

namespace deepgemm::attention {

// The keys that a query sees.
__forceinline__ Range seen_keys(const Params& p, int query) {
  const int begin = p.start ? min(max(p.start[query], 0), p.keys_end) : 0;
  const int end = max(begin, min(p.end[query], p.keys_end));
  return {begin, p.compressed ? begin + min(end - begin, p.columns) : end};
}

// A block of queries, and all tiles of keys that they see; by one thread, or by a warp's lanes.
template <Config config, int lanes>
__forceinline__ Part block_at(const Params& p, int index) {
  const int blocks = ceil_div(p.queries, config.block_queries());  // of a sequence
  Part part = {};
  part.sequence = p.by_blocks(index);
  const int skipped = (index - part.sequence * blocks) * config.block_queries();
  part.query = part.sequence * p.queries + skipped;
  part.queries = min(config.block_queries(), p.queries - skipped);
  Range all = {0x7fffffff, 0};
#pragma unroll 4
  for (int i = 0; i < config.block_queries(); i += lanes) {
    const int number = i + threadIdx.x % lanes;
    const Range keys = seen_keys(p, part.query + min(number, part.queries - 1));
    if (keys.begin == keys.end) continue;
    all.begin = min(all.begin, keys.begin / kTileKeys);
    part.keys_end = max(part.keys_end, keys.end);
  }
  if constexpr (lanes == 32) {
    all.begin = __reduce_min_sync(0xffffffff, all.begin);
    part.keys_end = __reduce_max_sync(0xffffffff, part.keys_end);
  }
  all.end = ceil_div(part.keys_end, kTileKeys);
  if (all.end) part.all = all;
  return part;
}

__forceinline__ int units_of(const Params& p, const Part& block) {
  return block.all.end - block.all.begin + p.clean;
}

// A CTA's share.
struct Share {
  int block;   // the next one
  int unit;    // of it, the next one
  int remain;  // units
  Part first;  // the block that it begins with
};

struct Scratch {
  int sums[32];  // each warp's units
  Share share;   // from the thread that found its beginning
};

// By all threads.
template <Config config>
__forceinline__ Share share_of_cta(const Params& p, Scratch& scratch) {
  const int blocks = p.sequences * ceil_div(p.queries, config.block_queries());
  const int each = ceil_div(blocks, config.threads());
  const int first = min(blocks, static_cast<int>(threadIdx.x) * each);
  const int last = min(blocks, first + each);
  Part part;
  int own = 0;
  for (int i = last; i-- > first;) {
    part = block_at<config, 1>(p, i);
    own += units_of(p, part);
  }

  int total, before = sum_before<config.threads()>(own, scratch.sums, total);
  const int share = p.by_ctas(total + gridDim.x - 1);
  const int begin = min(total, static_cast<int>(blockIdx.x) * share);
  const int remain = min(share, total - begin);
  if (before <= begin && begin < before + own) {
    int block = first;
    for (int units; (units = units_of(p, part)) <= begin - before; before += units) {
      part = block_at<config, 1>(p, ++block);
    }
    scratch.share = {block, begin - before, remain, part};
  } else if (begin == total && threadIdx.x == 0) {
    scratch.share = {};
  }
  __syncthreads();
  return scratch.share;
}

// By a warp.
template <Config config>
__forceinline__ Part next_part(const Params& p, Share& share) {
  while (share.remain > 0) {
    Part part = share.first;
    if (part.queries == 0) part = block_at<config, 32>(p, share.block);
    share.first.queries = 0;  // It was the first this once.
    ++share.block;
    const int units = units_of(p, part);
    const int taken = min(share.remain, units - share.unit);
    part.tiles.begin = part.all.begin + share.unit;
    part.tiles.end = min(part.all.end, part.tiles.begin + taken);
    part.edges = p.clean && share.unit + taken == units;
    share.unit = 0;
    share.remain -= taken;
    if (taken) return part;
  }
  return {};
}

}  // namespace deepgemm::attention
