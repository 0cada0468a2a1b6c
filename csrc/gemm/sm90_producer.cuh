// The warps of sm90.cuh that fill the ring: the copy thread, and the scale warps.
#pragma once

#include "gemm/sm90_ring.cuh"

namespace deepgemm::gemm {

// One operand's part of a tile, in each block of K: rows `row` on. At the operand's end (not
// `whole`) what is behind it is left as it is, for it takes the copy engine longer to fill rows
// with zeros than to load them, and nothing of D that depends on them is stored. The boxes there
// are of `edge_rows` if `in_boxes`, otherwise of as many as are left.
template <bool mn_major, int rows, int peers, int edge_rows = 0>
struct Rows {
  static constexpr int kBox = mn_major    ? kRowBytes / config.element_bytes()
                              : edge_rows ? edge_rows
                                          : 1;

  const TensorMap &whole_map, &edge_map;
  int row, end, batch;
  unsigned short peer_mask;
  uint64_t policy = kEvictNormal;
  bool in_boxes = false;

  // How many of so many rows from a first one on are loaded.
  __forceinline__ int loaded(int first, int count) const {
    const int left = end - first;
    return max(min(mn_major || in_boxes ? ceil_div(left, kBox) * kBox : left, count), 0);
  }

  __forceinline__ void load_box(uint32_t shared, const TensorMap& map, uint32_t barrier, int x,
                                int y) const {
    if constexpr (peers == 1) {
      tma_load(shared, &map, barrier, x, y, batch, policy);
    } else {
      tma_multicast(shared, &map, barrier, x, y, batch, peer_mask);
    }
  }

  template <bool whole>
  __forceinline__ void load(uint32_t shared, uint32_t barrier, int k) const {
    const int left = whole ? rows : end - row;
    if constexpr (mn_major) {
#pragma unroll
      for (int i = 0; i < rows; i += kBox) {
        if (i >= left) break;
        load_box(shared + i * kRowBytes, whole_map, barrier, row + i, k);
      }
    } else if (left >= rows) {
      load_box(shared, whole_map, barrier, k, row);
    } else {
#pragma unroll 1
      for (int i = 0; i < left; i += in_boxes ? edge_rows : rows) {
        load_box(shared + i * kRowBytes, edge_map, barrier, k, row + i);
      }
    }
  }
};

// What the consumers are told of a tile, before its first slot is full. One without blocks, in a
// slot without data, is the end.
__forceinline__ void announce(uint32_t shared, const Tiles& tile) {
  store_shared_quad(shared, make_uint4(tile.m0, tile.m_end, tile.n0, tile.d_batch));
  store_shared_quad(shared + 16,
                    make_uint4(tile.blocks(), tile.multiplied_rows(), tile.k0, tile.k_end));
}

// What a tile's sums are added to.
__forceinline__ void copy_c(const Params& p, const Tiles& tile, Ring& ring) {
  for (int slot = 0; slot < slots_of_c(p, tile.blocks()); ++slot) {
    const int first = slot * config.c_boxes();
    const int count = min(config.all_boxes() - first, config.c_boxes());
    barrier_wait(ring.empty(), ring.parity);
    barrier_arrive_expect(ring.full(), count * config.c_box_bytes());
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int part = (first + i) / config.row_boxes(), row = (first + i) % config.row_boxes();
      tma_load_4d(ring.c(i), &p.store, ring.full(), 0, tile.m0 + row * 16,
                  (tile.n0 + part * config.part_n()) / config.box_n(), tile.d_batch);
    }
    ring.advance();
  }
}

__forceinline__ void copy_tiles(const Params& p, Ring ring) {
  ring.parity = 1;  // slots are free from the first
  Tiles tile(p);
  // CTAs that share a tile load one part each and broadcast it.
  constexpr int a_rows = config.block_m / config.cluster_n;
  constexpr int b_rows = config.block_n / config.cluster_m;
  const int a_part = tile.n_rank * a_rows, b_part = tile.m_rank * b_rows;
  const InSlots<config.a_bytes()> a_parts(ring.at, ring.a() + a_part * kRowBytes);
  const InSlots<config.b_bytes()> b_parts(ring.at, ring.b() + b_part * kRowBytes);
  unsigned short a_peers = 0, b_peers = 0;
  for (int i = 0; i < config.cluster_n; ++i) a_peers |= 1 << (tile.m_rank + i * config.cluster_m);
  for (int i = 0; i < config.cluster_m; ++i) b_peers |= 1 << (i + tile.n_rank * config.cluster_m);
  int number = 0;
  for (; !tile.done; tile.next(), number = next_tile(number)) {
    const Rows<config.a_mn_major, a_rows, config.cluster_n, config.edge_rows()> a{
        p.a,          p.a_edge, tile.m0 + a_part, tile.m_end,
        tile.a_batch, a_peers,  kEvictNormal,     p.a_edge_in_boxes(config)};
    const Rows<config.b_mn_major, b_rows, config.cluster_m> b{
        p.b,
        p.b_edge,
        tile.n0 + b_part,
        p.n,
        tile.b_batch,
        b_peers,
        p.leave_first && tile.b_once ? kEvictFirst : kEvictNormal};
    const auto copy = [&]<bool whole>() {
      const int bytes =
          whole
              ? config.a_bytes() + config.b_bytes()
              : kRowBytes * (a.loaded(tile.m0, config.block_m) + b.loaded(tile.n0, config.block_n));
      const int k_end = tile.last_block() * config.block_k();
#pragma unroll 1
      for (int k = tile.first_block() * config.block_k(); k < k_end; k += config.block_k()) {
        barrier_wait(ring.empty(), ring.parity);
        barrier_arrive_expect(ring.full(), bytes);
        a.template load<whole>(a_parts.of(ring.at), ring.full(), k);
        b.template load<whole>(b_parts.of(ring.at), ring.full(), k);
        ring.advance();
      }
    };
    barrier_wait(ring.empty(), ring.parity);
    announce(ring.tile(number), tile);
    if (tile.of_none()) {
      barrier_arrive(ring.full());
      ring.advance();
    } else if (tile.a_whole() && tile.b_whole()) {
      copy.template operator()<true>();
    } else {
      copy.template operator()<false>();
    }
    copy_c(p, tile, ring);
  }
  barrier_wait(ring.empty(), ring.parity);
  store_shared_quad(ring.tile(number) + 16, make_uint4(0, 0, 0, 0));
  barrier_arrive(ring.full());
  if constexpr (config.cluster() > 1) {
    // No CTA may leave while consumers of another one still signal that a slot is empty.
    for (int i = 1; i < config.stages; ++i) {
      ring.advance();
      barrier_wait(ring.empty(), ring.parity);
    }
  }
}

constexpr int kAhead = 4;  // blocks of K whose scales are on their way

// What one lane of the scale warps brings of each block of K, one after the other. With kBlocks it
// is the scales of neighbouring rows of A, times those of B's blocks of columns: then a consumer
// has a single factor a row. If the tile is `whole`, its rows are all there and their scales
// aligned.
struct LaneScales {
  static constexpr int kLanes = 32 * kScaleWarps;
  static constexpr int kNeighbours = 2 * kLanes < config.block_m ? 4
                                     : kLanes < config.block_m   ? 2
                                                                 : 1;

  struct alignas(4 * kNeighbours) Neighbours {
    float x[kNeighbours];
  };

  struct Block {
    Neighbours a;
    float b[kScalesPerRow];
  };

  const Params& p;
  int row;                        // in the tile
  int rows;                       // of A from there on
  const float* a;                 // of the next block
  const float* b[kScalesPerRow];  // of the next kAhead
  bool whole;

  __forceinline__ LaneScales(const Params& p, const Tiles& tile, int thread)
      : p(p), row(kNeighbours * thread) {
    const int m = tile.m0 + row;
    a = p.a_scale + static_cast<long long>(tile.a_batch) * p.blocks_k * p.m + m;
    rows = has_row() ? tile.m_end - m : 0;
#pragma unroll
    for (int j = 0; j < kScalesPerRow; ++j) {
      const int n = min(tile.n0 / 128 + j, p.blocks_n - 1);
      b[j] = p.b_scale + (static_cast<long long>(tile.b_batch) * p.blocks_n + n) * p.blocks_k;
    }
    whole = tile.a_whole() && (tile.m0 | p.m) % kNeighbours == 0;
  }

  __forceinline__ bool has_row() const {
    return config.block_m % (kLanes * kNeighbours) == 0 || row < config.block_m;
  }

  template <bool whole>
  __forceinline__ void load(Block& block, int turn) {
    if constexpr (whole) {
      if (has_row()) block.a = *reinterpret_cast<const Neighbours*>(a);
    } else {
#pragma unroll
      for (int i = 0; i < kNeighbours; ++i) block.a.x[i] = i < rows ? a[i] : 0;
    }
    a += p.m;
#pragma unroll
    for (int j = 0; j < kScalesPerRow; ++j) {
      block.b[j] = b[j][turn];
      if (turn == kAhead - 1) b[j] += kAhead;
    }
  }

  __forceinline__ void store(const Block& block, const Ring& ring, bool) const {
    if (!has_row()) return;
#pragma unroll
    for (int j = 0; j < kScalesPerRow; ++j) {
      uint32_t x[4] = {};
#pragma unroll
      for (int i = 0; i < kNeighbours; ++i) x[i] = __float_as_uint(block.a.x[i] * block.b[j]);
      const uint32_t at = ring.scale(row, j);
      if constexpr (kNeighbours == 4) store_shared_quad(at, make_uint4(x[0], x[1], x[2], x[3]));
      if constexpr (kNeighbours == 2)
        store_shared_pair(at, __uint_as_float(x[0]), __uint_as_float(x[1]));
      if constexpr (kNeighbours == 1) store_shared(at, __uint_as_float(x[0]));
    }
  }
};

// A lane's scales of A's rows and of B's, one of every kStride, if there are so many blocks of K.
struct LaneOfBoth {
  static constexpr int kStride = 32 * kScaleWarps;
  static constexpr int kA = config.block_m / kStride, kBoth = kA + config.block_n / kStride;

  const float *a, *b;
  int a_rows, b_rows;  // how many there are from the first ones on

  __forceinline__ LaneOfBoth(const Params& p, const Tiles& tile, int a_lane, int b_lane, int blocks)
      : a_rows(tile.m_end - tile.m0 - a_lane), b_rows(p.n - tile.n0 - b_lane) {
    const long long a_block = static_cast<long long>(tile.a_batch) * blocks + tile.first_block();
    const long long b_block = static_cast<long long>(tile.b_batch) * blocks + tile.first_block();
    a = p.a_scale + a_block * p.m + tile.m0 + a_lane;
    b = p.b_scale + b_block * p.n + tile.n0 + b_lane;
  }

  template <bool whole>
  __forceinline__ float load(int i) const {
    const int row = (i < kA ? i : i - kA) * kStride;
    return whole || row < (i < kA ? a_rows : b_rows) ? (i < kA ? a : b)[row] : 0;
  }
};

// What a lane brings with kRows: scales that are the same for all of K, with its last block.
struct LaneRows : LaneOfBoth {
  static constexpr bool whole = false;

  struct Block {};

  int lane;

  __forceinline__ LaneRows(const Params& p, const Tiles& tile, int lane)
      : LaneOfBoth(p, tile, lane, lane, 1), lane(lane) {}

  template <bool whole>
  __forceinline__ void load(Block&, int) const {}

  __forceinline__ void store(const Block&, const Ring& ring, bool last) const {
    if (!last) return;
#pragma unroll
    for (int i = 0; i < kBoth; ++i) {
      const int row = lane + (i < kA ? i : i - kA) * kStride;
      store_shared(ring.scale(row, i >= kA), LaneOfBoth::load<false>(i));
    }
  }
};

// What a lane brings with kChannels. What a tile's elements are multiplied by, rows' scales times
// columns', is left to the tensor core: a scale is the sum of three bfloat16, exactly, and the
// products of A's parts and B's are added up along K, all but that of the last ones, which is 2^-32
// of the first.
struct LaneFactors : LaneOfBoth {
  struct Block {
    float x[kBoth];
  };

  const Params& p;
  int lane;
  bool whole;

  __forceinline__ LaneFactors(const Params& p, const Tiles& tile, int lane)
      : LaneOfBoth(p, tile, lane, factor_of(lane), p.blocks_k),
        p(p),
        lane(lane),
        whole(tile.a_whole() && tile.b_whole()) {}

  template <bool whole>
  __forceinline__ void load(Block& block, int) {
#pragma unroll
    for (int i = 0; i < kBoth; ++i) block.x[i] = LaneOfBoth::load<whole>(i);
    a += p.m;
    b += p.n;
  }

  __forceinline__ void store(const Block& block, const Ring& ring, bool) const {
#pragma unroll
    for (int i = 0; i < kBoth; ++i) {
      float part[3] = {block.x[i]};
#pragma unroll
      for (int j = 1; j < 3; ++j) {
        part[j] = part[j - 1] - __uint_as_float(__float_as_uint(part[j - 1]) & 0xffff0000);
      }
      const auto pair = [&](int j, int k) {
        return __byte_perm(__float_as_uint(part[j]), __float_as_uint(part[k]), 0x7632);
      };
      store_shared_quad(ring.factors(lane) + i * kStride * kFactorBytes,
                        i < kA ? make_uint4(pair(0, 0), pair(0, 1), pair(1, 1), pair(2, 2))
                               : make_uint4(pair(0, 1), pair(2, 0), pair(1, 2), pair(0, 1)));
    }
    fence_shared_for_copy_engine();
  }

  // What is left of K, in each slot.
  static __forceinline__ void clear(Ring ring, int lane) {
    for (; ring.parity == 0; ring.advance()) {
      for (int row = lane; row < config.block_m + config.block_n; row += kStride) {
        store_shared_quad(ring.factors(row, 1), make_uint4(0, 0, 0, 0));
      }
    }
  }
};

// The loads of blocks further on start as soon as there is room, lest their latency sets the pace,
// but where a fence (see LaneFactors) would wait for them: there so many at once. Where nothing is
// to be added up, scales are zero.
template <class Scales>
__forceinline__ void copy_scales(const Params& p, Ring ring, int thread) {
  constexpr bool at_once = config.scales == kChannels;
  ring.parity = 1;  // slots are free from the first
  const auto full = [&] {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.full());
  };
  for (Tiles tile(p); !tile.done; tile.next()) {
    Scales scales(p, tile, thread);
    const auto copy = [&]<bool whole>() {
      typename Scales::Block blocks[kAhead] = {};
      const auto load_all = [&](int count) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (i < count && !tile.empty()) scales.template load<whole>(blocks[i], i);
        }
      };
      int left = tile.blocks();
      if (!at_once) load_all(left);
      for (; left > 0; left -= kAhead) {
        if (at_once) load_all(left);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (left == i) break;
          barrier_wait(ring.empty(), ring.parity);
          scales.store(blocks[i], ring, left == i + 1);
          full();
          if (!at_once && i + kAhead < left) scales.template load<whole>(blocks[i], i);
          ring.advance();
        }
      }
    };
    if (scales.whole) {
      copy.template operator()<true>();
    } else {
      copy.template operator()<false>();
    }
    for (int left = slots_of_c(p, tile.blocks()); left > 0; --left) {
      barrier_wait(ring.empty(), ring.parity);
      full();
      ring.advance();
    }
  }
  barrier_wait(ring.empty(), ring.parity);
  full();
}

}  // namespace deepgemm::gemm
