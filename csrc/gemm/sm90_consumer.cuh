// The warpgroups of sm90.cuh that multiply, promote and store what is in the ring.
#pragma once

#include "device/store.cuh"
#include "device/wgmma.cuh"
#include "gemm/sm90_ring.cuh"

namespace deepgemm::gemm {

constexpr int kWaveRows = 64;  // of one product
constexpr int kConsumerRows = config.block_m / config.consumers;
constexpr int kWaves = kConsumerRows / kWaveRows;  // products, one after the other

using Out = OutType<config.out_float32>::type;
using Part = float[config.block_n / 2];
using Sum = Part[kWaves];

// Describes what a consumer multiplies of one operand, so many bytes from slot to slot. The lower
// word of a descriptor counts 16 of them as one.
template <int bytes>
struct Operand {
  uint64_t upper;
  InSlots<bytes / 16> lower;

  __forceinline__ Operand(const Ring& slot, uint64_t here)
      : upper(here >> 32 << 32), lower(slot.at, here) {}

  __forceinline__ uint64_t in(const Ring& slot) const { return upper | opaque(lower.of(slot.at)); }
};

// One consumer's view of the ring.
struct Reader {
  static constexpr int kBox = kRowBytes * config.block_k();

  Ring ring;
  int first_row;  // of this consumer in the tile
  Operand<config.a_bytes()> all_a;
  Operand<config.b_bytes()> all_b;
  Operand<config.scale_bytes()> all_a_factors, all_b_factors;
  uint32_t to_cta = 0;  // from a barrier here to that of the CTA that this lane tells
  bool ready;
  uint64_t a, b;
  uint64_t a_factors, b_factors;  // kChannels

  __forceinline__ Reader(const Ring& ring, int consumer)
      : ring(ring),
        first_row(consumer * kConsumerRows),
        all_a(ring, tile_descriptor(ring.a() + first_row * kRowBytes, config.a_mn_major * kBox)),
        all_b(ring, tile_descriptor(ring.b(), config.b_mn_major * kBox)),
        all_a_factors(ring, narrow_tile_descriptor(ring.factors(first_row))),
        all_b_factors(ring, narrow_tile_descriptor(ring.factors(config.block_m))) {
    if (config.cluster() > 1) to_cta = at_cta(ring.at, threadIdx.x % config.cluster()) - ring.at;
    find();
    test();
  }

  // What the next block's product needs is looked up off the path from one product to the next:
  // where its operands are while the last product runs, whether they are there before it is
  // promoted.
  __forceinline__ void advance() {
    ring.advance();
    ready = false;
    find();
  }
  __forceinline__ void test() { ready = barrier_test(ring.full(), ring.parity); }

  __forceinline__ void find() {
    a = all_a.in(ring);
    b = all_b.in(ring);
    if constexpr (config.scales == kChannels) {
      a_factors = all_a_factors.in(ring);
      b_factors = all_b_factors.in(ring);
    }
  }

  // This warp's first row in the tile: found anew each time, lest a register holds it.
  __forceinline__ int warp_row() const { return first_row + opaque(threadIdx.x) % 128 / 32 * 16; }

  __forceinline__ void wait() {
    if (!ready) barrier_wait(ring.full(), ring.parity);
    ready = true;
  }

  __forceinline__ void release(const Ring& slot) const {
    __syncwarp();
    if (threadIdx.x % 32 >= config.cluster()) return;
    if constexpr (config.cluster() == 1) {
      barrier_arrive(slot.empty());
    } else {
      barrier_arrive_at(slot.empty() + to_cta);
    }
  }

  // Starts the product of a wave's scales: what its elements are to be multiplied by.
  __forceinline__ void factor_product(Part& d, int wave) const {
    wgmma_fence();
    wgmma<config.block_n, kBfloat16, kBfloat16>(
        d, a_factors + wave * (kWaveRows * kFactorBytes >> 4), b_factors, false);
  }

  // Starts one block's product of a wave's rows.
  __forceinline__ void product(Part& d, int wave, bool accumulate) const {
    constexpr int a_step = config.a_mn_major ? 128 : 2, b_step = config.b_mn_major ? 128 : 2;
    const uint64_t rows = a + wave * (kWaveRows * kRowBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kRowBytes / 32; ++k) {
      wgmma<config.block_n, config.a_type, config.b_type, config.a_mn_major, config.b_mn_major>(
          d, rows + a_step * k, b + b_step * k, accumulate || k);
    }
    wgmma_commit();
  }
};

// Zeroes what lies outside the group's range of K in the slot of the tile's first or last block, i.
__forceinline__ void cut(const Ring& ring, uint32_t tile, int i) {
  const uint4 x = load_shared_quad(tile + 16);
  const int k = (x.z / config.block_k() + i) * config.block_k();
  const int first = max(int(x.z) - k, 0), end = min(int(x.w) - k, config.block_k());
  if (first == 0 && end == config.block_k()) return;
  const auto cut_operand = [&](uint32_t shared, int rows, bool mn_major) {
    for (int i = threadIdx.x; i < rows * (kRowBytes / 4); i += config.consumers * 128) {
      const int row = i / (kRowBytes / 4), word = i % (kRowBytes / 4);
      uint32_t keep = 0;
      if (mn_major) {
        const int k = row % config.block_k();
        if (k >= first && k < end) continue;
      } else {
        for (int byte = 0; byte < 4; ++byte) {
          const int k = (word * 4 + byte) / config.element_bytes();
          if (k >= first && k < end) keep |= 0xffu << 8 * byte;
        }
        if (keep == 0xffffffff) continue;
      }
      const uint32_t at = shared + row * kRowBytes + ((word * 4) ^ (row % 8 * 16));
      store_shared(at, __uint_as_float(__float_as_uint(load_shared(at)) & keep));
    }
  };
  cut_operand(ring.a(), config.block_m, config.a_mn_major);
  cut_operand(ring.b(), config.block_n, config.b_mn_major);
  fence_shared_for_copy_engine();
  named_barrier(1, config.consumers * 128);
}

// Where a warp's 16 rows of a tile's sums belong.
struct Output {
  int row, end;  // the first one, and the first that is not the tile's
  int column, batch;

  __forceinline__ Output(uint32_t tile, int row_in_tile) {
    const uint4 x = load_shared_quad(tile);
    row = x.x + row_in_tile;
    end = x.y;
    column = x.z;
    batch = x.w;
  }

  __forceinline__ long long first(const Params& p) const {
    return (static_cast<long long>(batch) * p.m + row) * p.n;
  }
};

// Zeroes a warp's rows of D.
__forceinline__ void clear_rows(const Params& p, uint32_t tile, int warp_row) {
#pragma unroll 1
  for (int w = 0; w < kWaves; ++w) {
    const Output to(tile, warp_row + w * kWaveRows);
    write_rows<16 / sizeof(Out)>(static_cast<Out*>(p.d) + to.first(p) + to.column,
                                 min(to.end - to.row, 16), min(config.block_n, p.n - to.column),
                                 p.n, false, threadIdx.x % 32,
                                 [](Out& to, int, int, int) { to = 0; });
  }
}

// How many blocks the next tile has in which this consumer has rows to multiply; 0 at the end.
// Passes over those of tiles in which it has none.
__forceinline__ int begin_tile(const Params& p, Reader& reader, int& tile) {
  for (;; tile = next_tile(tile)) {
    reader.wait();
    const uint4 told = load_shared_quad(reader.ring.tile(tile) + 16);
    const int blocks = uniform(told.x), rows = uniform(told.y);
    if (blocks == 0 || reader.first_row < rows) return blocks;
    if (config.groups == kContiguous && rows == 0) {
      clear_rows(p, reader.ring.tile(tile), reader.warp_row());
    }
    for (int i = 0; i < blocks + slots_of_c(p, blocks); ++i) {
      reader.wait();
      reader.release(reader.ring);
      reader.advance();
    }
  }
}

__forceinline__ void cut_ends(Reader& reader, int tile, int i, int blocks) {
  if (config.groups == kAlongK && (i == 0 || i == blocks - 1)) {
    cut(reader.ring, reader.ring.tile(tile), i);
  }
}

// sum += scale * part, with the scales of a row's first and second block of columns, of which the
// second begins at `boundary`.
__forceinline__ void promote(Part& sum, const Part& part, const float (&scale)[2][kScalesPerRow],
                             int boundary) {
  // Tiles are aligned with so many columns, and so is the boundary.
  constexpr int aligned = config.block_n & -config.block_n;
#pragma unroll
  for (int first = 0; first < config.block_n; first += aligned) {
    float s[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool second = first >= 128 || first >= aligned && first >= boundary;
      s[half] = kScalesPerRow == 2 && second ? scale[half][kScalesPerRow - 1] : scale[half][0];
    }
#pragma unroll
    for (int i = first / 2; i < (first + aligned) / 2; ++i) {
      sum[i] += s[i / 2 % 2] * part[i];
    }
  }
}

// What a thread's elements of a product are multiplied by: the scales of their rows and columns.
__forceinline__ void load_factors(Part& factors, const Ring& slot, int row) {
  const float scale[2] = {load_shared(slot.scale(row)), load_shared(slot.scale(row + 8))};
#pragma unroll
  for (int chunk = 0; chunk < config.block_n / 8; ++chunk) {
    const float2 column = load_shared_pair(slot.scale(8 * chunk + threadIdx.x % 4 * 2, 1));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factors[4 * chunk + 2 * half] = scale[half] * column.x;
      factors[4 * chunk + 2 * half + 1] = scale[half] * column.y;
    }
  }
}

// sum += C, if it comes behind the tile's blocks.
__forceinline__ void add_c(const Params& p, Reader& reader, Sum& sum, int blocks) {
  for (int slot = 0; slot < slots_of_c(p, blocks); ++slot) {
    reader.wait();
#pragma unroll
    for (int part = 0; part < config.parts(); ++part) {
#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
        const int row = (reader.warp_row() + w * kWaveRows) / 16;
        const int box = uniform(part * config.row_boxes() + row - slot * config.c_boxes());
        if (box < 0 || box >= config.c_boxes()) continue;
        add_rows<Out, config.box_bytes(), config.part_n() / 2>(
            sum[w] + part * config.part_n() / 2, reader.ring.c(box), opaque(threadIdx.x % 32));
      }
    }
    reader.release(reader.ring);
    reader.advance();
    reader.test();
  }
}

// Writes a consumer's sums by way of shared memory, so many parts of their columns one after the
// other. Each warp hands its own rows to the copy engine: nothing outside the warp waits.
template <class Staged, int parts>
__forceinline__ void store_parts(const Params& p, const Sum& sum, const Ring& ring, uint32_t tile,
                                 int warp_row, bool add) {
  constexpr int box = config.box_bytes(), columns = config.block_n / parts;
  constexpr bool converts = sizeof(Staged) != sizeof(Out);
  // Opaque, lest all addresses are found once for all tiles and kept in registers.
  const int lane = opaque(threadIdx.x % 32);
  const auto staged = [&](int w) {
    return ring.d() + (warp_row + w * kWaveRows) * columns * int(sizeof(Staged));
  };
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    if (lane == 0) tma_store_wait_read();
    __syncwarp();
#pragma unroll
    for (int w = 0; w < kWaves; ++w) {
      stage_rows<Staged, box, columns / 2>(sum[w] + part * columns / 2, staged(w), lane);
    }
    fence_shared_for_copy_engine();
    __syncwarp();
#pragma unroll 1
    for (int w = 0; w < kWaves; ++w) {
      const Output to(tile, warp_row + w * kWaveRows);
      const int column = to.column + part * columns;
      // The copy engine stops at the end of D, not at that of a group.
      if (converts || !p.copy_engine || config.groups == kContiguous && to.end - to.row < 16) {
        copy_rows<Staged, box>(staged(w), static_cast<Out*>(p.d) + to.first(p) + column,
                               min(to.end - to.row, 16), min(columns, p.n - column), p.n, add,
                               lane);
      } else if (lane == 0 && (config.groups != kMasked || to.row < to.end)) {
        if (config.out_float32 && add) {
          tma_add(&p.store, staged(w), 0, to.row, column / config.box_n(), to.batch);
        } else {
          tma_store(&p.store, staged(w), 0, to.row, column / config.box_n(), to.batch,
                    p.keep_d ? kEvictLast : kEvictNormal);
        }
        tma_store_commit();
      }
    }
  }
}

// Adds a tile's sums to C and stores them.
__forceinline__ void store(const Params& p, Reader& reader, Sum& sum, int tile, int blocks) {
  const uint32_t told = reader.ring.tile(tile);
  const bool add = config.accumulate && slots_of_c(p, blocks) == 0;
  add_c(p, reader, sum, blocks);
  if (!config.out_float32 && add) {
    // In float32, lest the sum with D is rounded twice.
    store_parts<float, 2 * config.parts()>(p, sum, reader.ring, told, reader.warp_row(), add);
  } else {
    store_parts<Out, config.parts()>(p, sum, reader.ring, told, reader.warp_row(), add);
  }
}

// FP8: each product is promoted.
__forceinline__ void multiply_and_promote(const Params& p, Reader reader) {
  const int row = opaque(reader.warp_row() + threadIdx.x % 32 / 4);
  Part part;
  for (int tile = 0; const int blocks = begin_tile(p, reader, tile); tile = next_tile(tile)) {
    // Zeroed while the first product runs, but of two waves: for these the branch costs more.
    Sum sum;
    if constexpr (kWaves > 1) {
#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
#pragma unroll
        for (int j = 0; j < config.block_n / 2; ++j) sum[w][j] = 0;
      }
    }
    const int boundary = 128 - int(uniform(load_shared_int(reader.ring.tile(tile) + 8)) % 128);
    for (int i = 0;;) {
      cut_ends(reader, tile, i, blocks);
#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
        Part factors;                   // kChannels
        float scale[2][kScalesPerRow];  // kBlocks
        pin(part);
        if constexpr (config.scales == kChannels) reader.factor_product(factors, w);
        reader.product(part, w, false);
        if (kWaves == 1 && i == 0) clear(sum[w]);
        const Ring slot = reader.ring;
        if constexpr (config.scales == kBlocks) {
          // Read while the product runs.
#pragma unroll
          for (int j = 0; j < 2 * kScalesPerRow; ++j) {
            const int half = j / kScalesPerRow, which = j % kScalesPerRow;
            scale[half][which] = load_shared(slot.scale(row + w * kWaveRows + half * 8, which));
          }
        }
        if (w == kWaves - 1) reader.advance();
        wgmma_wait<0>();
        pin(part);
        if constexpr (config.scales == kChannels) pin(factors);
        if (w == kWaves - 1) {
          reader.release(slot);
          reader.test();
        }
        if constexpr (config.scales == kBlocks) {
          promote(sum[w], part, scale, boundary);
        } else {
#pragma unroll
          for (int j = 0; j < config.block_n / 2; ++j) sum[w][j] += factors[factor_of(j)] * part[j];
        }
      }
      if (++i == blocks) break;
      // At the loop's end, where it is still in a predicate whether there is anything to wait for.
      reader.wait();
    }
    store(p, reader, sum, tile, blocks);
  }
}

// Without scales of blocks: a block's product runs while the one before it retires. Those of
// bfloat16 add up in `sum`; of FP8 so many add up before they are promoted, and the sum is scaled
// at last.
constexpr int kAddUp = 4;

__forceinline__ void multiply(const Params& p, Reader reader) {
  constexpr bool promotes = config.scales == kRows;
  static_assert(!promotes || kWaves == 1);
  Sum sum;
  Part part;
  const auto pin_all = [&] {
#pragma unroll
    for (int w = 0; w < kWaves; ++w) pin(sum[w]);
    if constexpr (promotes) pin(part);
  };
  for (int tile = 0; const int blocks = begin_tile(p, reader, tile); tile = next_tile(tile)) {
    Ring before = reader.ring;
    if (promotes) clear(sum[0]);
    pin_all();
    for (int i = 0; i < blocks; ++i) {
      reader.wait();
      cut_ends(reader, tile, i, blocks);
#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
        reader.product(promotes ? part : sum[w], w, promotes ? i % kAddUp > 0 : i > 0);
      }
      wgmma_wait<kWaves>();
      if (i > 0) reader.release(before);
      before = reader.ring;
      reader.advance();
      reader.test();
      if (promotes && (i % kAddUp == kAddUp - 1 || i == blocks - 1)) {
        wgmma_wait<0>();
        pin_all();
#pragma unroll
        for (int j = 0; j < config.block_n / 2; ++j) sum[0][j] += part[j];
      }
    }
    wgmma_wait<0>();
    pin_all();
    const int warp_row = reader.warp_row();
    if constexpr (promotes) {
      Part factors;
      load_factors(factors, before, warp_row + threadIdx.x % 32 / 4);
#pragma unroll
      for (int j = 0; j < config.block_n / 2; ++j) sum[0][j] *= factors[j];
    }
    reader.release(before);
    store(p, reader, sum, tile, blocks);
  }
}

__forceinline__ void consume(const Params& p, Ring ring, int consumer) {
  const Reader reader(ring, consumer);
  if constexpr (config.scales == kNoScales || config.scales == kRows) {
    multiply(p, reader);
  } else {
    multiply_and_promote(p, reader);
  }
  // Shared memory outlives what the copy engine still reads of it.
  if (threadIdx.x % 32 == 0) tma_store_wait_read();
}

}  // namespace deepgemm::gemm
