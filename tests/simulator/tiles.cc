// The walk of all CTAs over the tiles of a dense GEMM, as a function for ctypes.
#include "gemm/plan.h"
#include "gemm/sm90_ring.cuh"
#include "simulator.h"
#include "tensor_map.h"

// Adds up, for each element of D, how often it is some tile's.
extern "C" void run(int batch, int m, int n, int k, int num_sms, int* times) {
  using namespace deepgemm::gemm;
  Operands operands = {};
  operands.a = {nullptr, uint64_t(batch), uint64_t(m), uint64_t(k)};
  operands.b = {nullptr, uint64_t(batch), uint64_t(n), uint64_t(k)};
  operands.d = {nullptr, uint64_t(batch), uint64_t(m), uint64_t(n)};
  auto [params, clusters] = plan(config, num_sms, operands);
  sim::launch(clusters * config.cluster(), 1, config.cluster(), [&] {
    for (Tiles tile(params); !tile.done; tile.next()) {
      for (int i = tile.m0; i < min(tile.m0 + config.block_m, tile.m_end); ++i) {
        for (int j = tile.n0; j < min(tile.n0 + config.block_n, n); ++j) {
          ++times[(tile.d_batch * m + i) * n + j];
        }
      }
    }
  });
}
