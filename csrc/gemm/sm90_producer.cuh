// The warps of sm90.cuh that fill the ring: the copy thread, and where each column has a scale the
// scale warps.
#pragma once

#include "gemm/sm90_ring.cuh"

namespace deepgemm::gemm {

// Rows `row` on of an operand, a block along K.
template <bool mn_major, int rows, int peers>
__forceinline__ void load(uint32_t shared, const TensorMap& map, uint32_t barrier, int kb, int row,
                          int batch, unsigned short peer_mask) {
  const int k = kb * config.block_k();
  if constexpr (mn_major) {
    constexpr int box = kRowBytes / config.element_bytes();
#pragma unroll
    for (int i = 0; i < rows; i += box) {
      tma_load<peers>(shared + i * kRowBytes, &map, barrier, row + i, k, batch, peer_mask);
    }
  } else {
    tma_load<peers>(shared, &map, barrier, k, row, batch, peer_mask);
  }
}

// What the copy thread brings of the scales with a block of K.
struct TileScales {
  static constexpr int kB = config.scales == kBlocks ? kScalesPerRow : 1;

  const Params& p;
  const float *a, *b[kB];  // the tile's first ones, in the first block of K
  int rows, columns;       // how many there are of each

  __forceinline__ TileScales(const Params& p, const Tiles& tile)
      : p(p),
        rows(min(p.m - tile.m0, config.block_m)),
        columns(min(p.n - tile.n0, config.block_n)) {
    const long long blocks_k = config.scales == kRows ? 1 : p.blocks_k;
    a = p.a_scale + tile.a_batch * blocks_k * p.m + tile.m0;
    for (int i = 0; i < kB; ++i) {
      const int block = min(tile.n0 / 128 + i, p.blocks_n - 1);
      b[i] = config.scales == kRows
                 ? p.b_scale + tile.b_batch * static_cast<long long>(p.n) + tile.n0
                 : p.b_scale + (tile.b_batch * p.blocks_n + block) * blocks_k;
    }
  }

  // How many floats a block's scales of A lie behind a multiple of 16 bytes.
  __forceinline__ int shift(int kb) const {
    return reinterpret_cast<uint64_t>(a + static_cast<long long>(kb) * p.m) / 4 % 4;
  }

  // Brings floats; returns how many bytes of them the barrier is to expect. The others count as
  // the thread's own copies: what is not aligned, and the last few of all.
  static __forceinline__ int bring(uint32_t shared, const float* x, int count, const float* end,
                                   uint32_t barrier) {
    const long long left = (end - x) / 4 * 4;
    const int whole = reinterpret_cast<uint64_t>(x) % 16 ? 0 : min(ceil_div(count, 4) * 4LL, left);
    if (whole > 0) copy_bulk(shared, x, whole * 4, barrier);
    for (int i = whole; i < count; ++i) copy_async(shared + i * 4, x + i);
    return whole * 4;
  }

  // Of a block; if scales are the same for all of K, with the last one.
  __forceinline__ int bring(const Ring& ring, int kb, bool last) const {
    int bytes = 0;
    if constexpr (config.scales == kBlocks) {
      const float* x = a + static_cast<long long>(kb) * p.m;
      if (rows > 0) {
        bytes = bring(ring.a_scale(), x - shift(kb), rows + shift(kb), p.a_scale_end, ring.full());
      }
      for (int i = 0; i < kB; ++i) copy_async(ring.b_scale(i), b[i] + kb);
    } else if (last) {
      bytes = bring(ring.a_scale(), a, rows, p.a_scale_end, ring.full()) +
              bring(ring.b_scale(), b[0], columns, p.b_scale_end, ring.full());
    }
    barrier_arrive_after_copies(ring.full());
    return bytes;
  }
};

// What the consumers are told of a tile, before its first slot is full: where it belongs, and its
// blocks; at the end 0, and of a tile that has none -1, either in a slot without data.
__forceinline__ void announce(uint32_t shared, const Tiles& tile, int shift) {
  const int first_block = tile.first_block(), blocks = tile.last_block() - first_block;
  store_shared_quad(shared, make_uint4(tile.m0, tile.m_end, tile.n0, tile.d_batch));
  store_shared_quad(shared + 16,
                    make_uint4(blocks ? blocks : -1, config.groups == kAlongK ? first_block : shift,
                               tile.k0, tile.k_end));
}

__forceinline__ void arrive_without_data(const Ring& ring) {
  barrier_arrive(ring.full());
  if (kCopiesScales) barrier_arrive(ring.full());
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
    const TileScales scales(p, tile);
    const int first_block = tile.first_block(), last_block = tile.last_block();
    barrier_wait(ring.empty(), ring.parity ^ 1);
    announce(ring.tile(number), tile, scales.shift(0));
    if (first_block == last_block) {
      arrive_without_data(ring);
      ring.advance();
    }
    for (int kb = first_block; kb < last_block; ++kb, ring.advance()) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      int bytes = config.a_bytes() + config.b_bytes();
      if constexpr (kCopiesScales) bytes += scales.bring(ring, kb, kb == last_block - 1);
      barrier_arrive_expect(ring.full(), bytes);
      load<config.a_mn_major, a_rows, config.cluster_n>(ring.a() + a_part * kRowBytes, p.a,
                                                        ring.full(), kb, tile.m0 + a_part,
                                                        tile.a_batch, a_peers);
      load<config.b_mn_major, b_rows, config.cluster_m>(ring.b() + b_part * kRowBytes, p.b,
                                                        ring.full(), kb, tile.n0 + b_part,
                                                        tile.b_batch, b_peers);
    }
  }
  barrier_wait(ring.empty(), ring.parity ^ 1);
  store_shared_quad(ring.tile(number) + 16, make_uint4(0, 0, 0, 0));
  arrive_without_data(ring);
}

// What one lane of the scale warps brings (kChannels). What a tile's elements are multiplied by,
// rows' scales times columns', is left to the tensor core: a scale is the sum of three bfloat16,
// exactly, and the nine products of A's parts and B's are added up along nine of 16 of K. A lane
// brings two neighbours of every 64 rows that its warp brings.
struct LaneFactors {
  static constexpr int kParts = 3;
  static constexpr int kOfA = config.block_m / kFactorRows;
  static constexpr int kOfBoth = kOfA + config.block_n / kFactorRows;
  static constexpr int kMine = ceil_div(kOfBoth, kScaleWarps ? kScaleWarps : 1);

  const Params& p;
  int warp, lane;
  const float* first[kMine];  // the lane's scales in the first block of K
  int rows[kMine];            // how many rows there are from there on
  int last_block;

  struct Block {
    float scales[kMine][2];
  };

  __forceinline__ int box(int i) const { return i * kScaleWarps + warp; }
  __forceinline__ bool of_a(int i) const { return box(i) < kOfA; }

  __forceinline__ LaneFactors(const Params& p, const Tiles& tile, int thread)
      : p(p), warp(uniform(thread / 32)), lane(thread % 32), last_block(tile.last_block() - 1) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int size = of_a(i) ? p.m : p.n;
      const int row =
          of_a(i) ? tile.m0 + box(i) * kFactorRows : tile.n0 + (box(i) - kOfA) * kFactorRows;
      const long long batch = of_a(i) ? tile.a_batch : tile.b_batch;
      first[i] = (of_a(i) ? p.a_scale : p.b_scale) + batch * p.blocks_k * size + row + 2 * lane;
      rows[i] = box(i) >= kOfBoth ? 0 : size - row - 2 * lane;
    }
  }

  __forceinline__ void load(Block& x, int kb) const {
    kb = min(kb, last_block);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const float* scales = first[i] + static_cast<long long>(kb) * (of_a(i) ? p.m : p.n);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = of_a(i) ? j : 1 - j;  // see factor_of
        x.scales[i][j] = row < rows[i] ? __ldg(scales + row) : 0;
      }
    }
  }

  __forceinline__ void store(const Block& x, const Ring& ring) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (box(i) >= kOfBoth) break;
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

__forceinline__ void copy_scales(const Params& p, Ring ring, int thread) {
  // So many blocks' loads are under way at once, or their latency would set the pace; and all of
  // them together, because the fence in `store` waits for every load that is.
  constexpr int at_once = 4;
  const auto pass_on = [&] {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.full());
    ring.advance();
  };
  LaneFactors::clear(ring, thread);
  for (Tiles tile(p); !tile.done; tile.next()) {
    const LaneFactors factors(p, tile, thread);
    const int first_block = tile.first_block(), last_block = tile.last_block();
    for (int kb = first_block; kb < last_block; kb += at_once) {
      LaneFactors::Block blocks[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) factors.load(blocks[i], kb + i);
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        if (kb + i == last_block) break;
        barrier_wait(ring.empty(), ring.parity ^ 1);
        factors.store(blocks[i], ring);
        pass_on();
      }
    }
    if (first_block == last_block) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      pass_on();
    }
  }
  barrier_wait(ring.empty(), ring.parity ^ 1);
  pass_on();
}

}  // namespace deepgemm::gemm
