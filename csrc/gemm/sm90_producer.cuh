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
  __forceinline__ void load(uint32_t shared, uint32_t barrier, int kb) const {
    const int k = kb * config.block_k(), left = whole ? rows : end - row;
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
// slot without data, is the end; a slice has a negative number of them.
__forceinline__ void announce(uint32_t shared, const Tiles& tile) {
  store_shared_quad(shared, make_uint4(tile.m0, tile.m_end, tile.n0, tile.d_batch));
  const int first_block = tile.first_block(), blocks = tile.last_block() - first_block;
  store_shared_quad(shared + 16, make_uint4(config.slices() > 1 && tile.slice ? -blocks : blocks,
                                            first_block, tile.k0, tile.k_end));
}

__forceinline__ void copy_tiles(const Params& p, Ring ring) {
  Tiles tile(p);
  // CTAs that share a tile load one part each and broadcast it.
  constexpr int a_rows = config.block_m / config.cluster_n;
  constexpr int b_rows = config.block_n / config.cluster_m;
  const int a_part = tile.n_rank * a_rows, b_part = tile.m_rank * b_rows;
  unsigned short a_peers = 0, b_peers = 0;
  for (int i = 0; i < config.cluster_n; ++i) a_peers |= 1 << (tile.m_rank + i * config.cluster_m);
  for (int i = 0; i < config.cluster_m; ++i) b_peers |= 1 << (i + tile.n_rank * config.cluster_m);
  int number = 0;
  for (; !tile.done; tile.next(), number = next_tile(number)) {
    const Rows<config.a_mn_major, a_rows, config.cluster_n, config.edge_rows()> a{
        p.a,
        p.a_edge,
        tile.m0 + a_part,
        tile.a_end(),
        tile.a_batch,
        a_peers,
        kEvictNormal,
        config.groups == kDense ? config.slices() > 1 && p.sliced() : config.groups != kAlongK};
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
      const int last_block = tile.last_block();
      for (int kb = tile.first_block(); kb < last_block; ++kb, ring.advance()) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        if (kb == tile.first_block()) announce(ring.tile(number), tile);
        barrier_arrive_expect(ring.full(), bytes);
        a.template load<whole>(ring.a() + a_part * kRowBytes, ring.full(), kb);
        b.template load<whole>(ring.b() + b_part * kRowBytes, ring.full(), kb);
      }
    };
    if (tile.m0 + config.block_m <= tile.a_end() && tile.n0 + config.block_n <= p.n) {
      copy.template operator()<true>();
    } else {
      copy.template operator()<false>();
    }
  }
  barrier_wait(ring.empty(), ring.parity ^ 1);
  store_shared_quad(ring.tile(number) + 16, make_uint4(0, 0, 0, 0));
  barrier_arrive(ring.full());
  if constexpr (config.cluster() > 1) {
    // No CTA may leave while consumers of another one still signal that a slot is empty.
    for (int i = 1; i < config.stages; ++i) {
      ring.advance();
      barrier_wait(ring.empty(), ring.parity ^ 1);
    }
  }
}

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
  int row;                      // in the tile
  const float *a, *b;           // of the next block; of the first one
  int a_rows, b_columns;        // how many rows of the tile, and blocks of columns, begin there
  int next = 0, blocks;         // of K
  float some_b[kScalesPerRow];  // B's of 32 blocks of K, one a lane
  bool whole;

  __forceinline__ LaneScales(const Params& p, const Tiles& tile, int thread)
      : p(p), row(kNeighbours * thread), blocks(tile.last_block() - tile.first_block()) {
    const int m = tile.m0 + row, n = min(tile.n0 / 128, p.blocks_n - 1);
    a = p.a_scale + static_cast<long long>(tile.a_batch) * p.blocks_k * p.m + m;
    b = p.b_scale + (static_cast<long long>(tile.b_batch) * p.blocks_n + n) * p.blocks_k;
    a_rows = tile.empty() || !has_row() ? 0 : tile.a_end() - m;
    b_columns = tile.empty() ? 0 : p.blocks_n - n;
    whole = !tile.empty() && tile.m0 + config.block_m <= tile.a_end() &&
            (tile.m0 | p.m) % kNeighbours == 0;
  }

  __forceinline__ bool has_row() const {
    return config.block_m % (kLanes * kNeighbours) == 0 || row < config.block_m;
  }

  // `turn` of so many that divide 32.
  template <bool whole>
  __forceinline__ void load(Block& block, int turn) {
    if (next == blocks) return;
    if (turn == 0 && next % 32 == 0) {
      const int mine = next + threadIdx.x % 32;
#pragma unroll
      for (int j = 0; j < kScalesPerRow; ++j) {
        some_b[j] = mine < blocks && j < b_columns ? __ldg(b + j * p.blocks_k + mine) : 0;
      }
    }
    block.a = {};
    if constexpr (whole) {
      if (has_row()) block.a = *reinterpret_cast<const Neighbours*>(a);
    } else {
#pragma unroll
      for (int i = 0; i < kNeighbours; ++i) block.a.x[i] = i < a_rows ? __ldg(a + i) : 0;
    }
#pragma unroll
    for (int j = 0; j < kScalesPerRow; ++j) {
      block.b[j] = __shfl_sync(0xffffffff, some_b[j], next % 32);
    }
    a += p.m;
    ++next;
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

// The same for kRows: what is the same for all of K is wanted with its last block.
struct LaneRows {
  static constexpr int kStride = 32 * kScaleWarps;
  static constexpr int kA = config.block_m / kStride, kB = config.block_n / kStride;
  static constexpr bool whole = false;

  struct Block {};

  const float *a, *b;  // the lane's first scale of A and of B
  int a_rows, b_rows;  // how many rows there are from there on
  int lane;

  __forceinline__ LaneRows(const Params& p, const Tiles& tile, int lane) : lane(lane) {
    const int m = tile.m0 + lane, n = tile.n0 + lane;
    a = p.a_scale + static_cast<long long>(tile.a_batch) * p.m + m;
    b = p.b_scale + static_cast<long long>(tile.b_batch) * p.n + n;
    a_rows = tile.a_end() - m;
    b_rows = p.n - n;
  }

  template <bool whole>
  __forceinline__ void load(Block&, int) const {}

  __forceinline__ void store(const Block&, const Ring& ring, bool last) const {
    if (!last) return;
#pragma unroll
    for (int j = 0; j < kA + kB; ++j) {
      const int row = (j < kA ? j : j - kA) * kStride;
      const float x = row < (j < kA ? a_rows : b_rows) ? __ldg((j < kA ? a : b) + row) : 0;
      store_shared(ring.scale(lane + row, j >= kA), x);
    }
  }
};

// The same for kChannels. What a tile's elements are multiplied by, rows' scales times columns', is
// left to the tensor core: a scale is the sum of three bfloat16, exactly, and the nine products of
// A's parts and B's are added up along nine of 16 of K. A lane brings two neighbours of every 64
// rows that its warp brings.
struct LaneFactors {
  static constexpr int kParts = 3;
  static constexpr int kOfA = config.block_m / kFactorRows;
  static constexpr int kOfBoth = kOfA + config.block_n / kFactorRows;
  static constexpr int kMine = ceil_div(kOfBoth, kScaleWarps);

  const Params& p;
  int warp, lane;
  const float* next[kMine];  // the lane's scales in the next block of K
  int rows[kMine];           // how many rows there are from there on
  int left;                  // blocks
  bool whole;

  struct Block {
    float scales[kMine][2];
  };

  __forceinline__ int box(int i) const { return i * kScaleWarps + warp; }
  __forceinline__ bool of_a(int i) const {
    return kOfA % kScaleWarps == 0 ? i * kScaleWarps < kOfA : box(i) < kOfA;
  }
  __forceinline__ bool is_box(int i) const {
    return (i + 1) * kScaleWarps <= kOfBoth || box(i) < kOfBoth;
  }

  __forceinline__ LaneFactors(const Params& p, const Tiles& tile, int thread)
      : p(p),
        warp(uniform(thread / 32)),
        lane(thread % 32),
        left(tile.last_block() - tile.first_block()),
        whole(!tile.empty() && tile.m0 + config.block_m <= p.m && tile.n0 + config.block_n <= p.n) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int size = of_a(i) ? p.m : p.n;
      const int row =
          of_a(i) ? tile.m0 + box(i) * kFactorRows : tile.n0 + (box(i) - kOfA) * kFactorRows;
      const long long batch = of_a(i) ? tile.a_batch : tile.b_batch;
      next[i] = (of_a(i) ? p.a_scale : p.b_scale) +
                (batch * p.blocks_k + tile.first_block()) * size + row + 2 * lane;
      rows[i] = tile.empty() || !is_box(i) ? 0 : size - row - 2 * lane;
    }
  }

  template <bool whole>
  __forceinline__ void load(Block& x, int) {
    if (--left < 0) return;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = of_a(i) ? j : 1 - j;  // see factor_of
        x.scales[i][j] = whole && is_box(i) || row < rows[i] ? __ldg(next[i] + row) : 0;
      }
      next[i] += of_a(i) ? p.m : p.n;
    }
  }

  __forceinline__ void store(const Block& x, const Ring& ring, bool) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (!is_box(i)) break;
      float rest[2] = {x.scales[i][0], x.scales[i][1]};
      uint32_t parts[kParts];  // of both, the second one in the upper half
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        parts[part] = __byte_perm(__float_as_uint(rest[0]), __float_as_uint(rest[1]), 0x7632);
#pragma unroll
        for (int j = 0; j < 2; ++j)
          rest[j] -= __uint_as_float(__float_as_uint(rest[j]) & 0xffff0000);
      }
#pragma unroll
      for (int k = 0; k < kParts * kParts; ++k) {
        const uint32_t both = of_a(i) ? parts[k / kParts] : parts[k % kParts];
        const uint32_t at =
            ring.factors(box(i) * kFactorRows) + k * kRowBytes + (lane * 4 ^ k % 8 * 16);
        store_shared(at, __uint_as_float(both));
      }
    }
    fence_shared_for_copy_engine();
  }

  // What is left of K, in each slot.
  static __forceinline__ void clear(Ring ring, int thread) {
    for (; ring.parity == 0; ring.advance()) {
      for (int box = thread / 32; box < kOfBoth; box += kScaleWarps) {
        for (int k = kParts * kParts; k < kFactorBytes / kRowBytes; ++k) {
          const uint32_t row = ring.factors(box * kFactorRows) + k * kRowBytes;
          store_shared(row + thread % 32 * 4, 0);
        }
      }
    }
  }
};

template <class Scales>
__forceinline__ void copy_scales(const Params& p, Ring ring, int thread) {
  // So many blocks' loads are in flight, or their latency would set the pace. The next ones start
  // as soon as there is room, but where a fence (see LaneFactors) would wait for them: there so
  // many at once.
  constexpr int ahead = 4;
  constexpr bool at_once = config.scales == kChannels;
  for (Tiles tile(p); !tile.done; tile.next()) {
    Scales scales(p, tile, thread);
    const auto copy = [&]<bool whole>() {
      typename Scales::Block blocks[ahead];
      const auto load_all = [&] {
#pragma unroll
        for (int i = 0; i < ahead; ++i) scales.template load<whole>(blocks[i], i);
      };
      if (!at_once) load_all();
      for (int left = tile.last_block() - tile.first_block(); left > 0; left -= ahead) {
        if (at_once) load_all();
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
          if (left == i) break;
          barrier_wait(ring.empty(), ring.parity ^ 1);
          scales.store(blocks[i], ring, left == i + 1);
          __syncwarp();
          if (threadIdx.x % 32 == 0) barrier_arrive(ring.full());
          if (!at_once) scales.template load<whole>(blocks[i], i);
          ring.advance();
        }
      }
    };
    if (scales.whole) {
      copy.template operator()<true>();
    } else {
      copy.template operator()<false>();
    }
  }
  barrier_wait(ring.empty(), ring.parity ^ 1);
  if (threadIdx.x % 32 == 0) barrier_arrive(ring.full());
}

}  // namespace deepgemm::gemm
