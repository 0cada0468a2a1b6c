#include "gemm/handler.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <string>
#include <string_view>

#include "jit/compile.h"
#include "jit/tensor_map.h"

namespace ffi = xla::ffi;

namespace deepgemm {

ffi::TypeId GemmState::id = {};

int gemm_smem_bytes(const std::vector<int>& config) {
  return jit::config_from<gemm::Config>(config).smem_bytes();
}

namespace {

using gemm::kBlockK;

template <class F>
ffi::Error guarded(F f) {
  try {
    f();
    return ffi::Error::Success();
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("fp8_gemm_nt: ") + e.what());
  }
}

ffi::ErrorOr<std::unique_ptr<GemmState>> instantiate(ffi::Span<const int64_t> config,
                                                     std::string_view arch, int64_t num_sms) {
  std::unique_ptr<GemmState> state;
  const ffi::Error error = guarded([&] {
    const auto& kernel =
        jit::Kernel::get({"gemm/sm90.cuh", {config.begin(), config.end()}, std::string(arch)});
    state.reset(
        new GemmState{jit::config_from<gemm::Config>(config), static_cast<int>(num_sms), kernel});
  });
  if (error.failure()) return ffi::Unexpected(error);
  return state;
}

ffi::Error initialize(GemmState* state) {
  return guarded([&] { state->kernel.prepare(state->config.smem_bytes()); });
}

// [rows, columns], or [batch, rows, columns].
struct Matrix {
  uint64_t batch, rows, columns;

  explicit Matrix(const ffi::AnyBuffer& x) {
    const auto dims = x.dimensions();
    batch = dims.size() == 3 ? dims.front() : 1;
    rows = dims[dims.size() - 2];
    columns = dims[dims.size() - 1];
  }
};

// A box of `rows` rows along the columns, of elements of `bytes` bytes.
jit::CUtensorMap matrix_map(const void* address, Matrix m, uint64_t bytes, uint32_t box_columns,
                            uint32_t box_rows, jit::CUtensorMapDataType type,
                            jit::CUtensorMapSwizzle swizzle) {
  return jit::tensor_map(address, type, {m.columns, m.rows, m.batch},
                         {m.columns * bytes, m.columns * m.rows * bytes},
                         {box_columns, box_rows, 1}, swizzle);
}

ffi::Error execute(jit::CUstream stream, GemmState* state, ffi::AnyBuffer a, ffi::AnyBuffer a_scale,
                   ffi::AnyBuffer b, ffi::AnyBuffer b_scale,
                   ffi::RemainingArgs /* C, in D's place */, ffi::Result<ffi::AnyBuffer> d) {
  return guarded([&] {
    const gemm::Config& config = state->config;
    const Matrix am(a), bm(b), dm(*d);
    const int rows = ceil_div(dm.rows, config.block_m * config.cluster_m);
    const int columns = ceil_div(dm.columns, config.block_n * config.cluster_n);
    const int clusters =
        std::min<int>(state->num_sms / config.cluster(), rows * columns * dm.batch);

    gemm::Params params = {};
    const auto fp8 = [&](const ffi::AnyBuffer& x, Matrix m, int box_rows) {
      return matrix_map(x.untyped_data(), m, 1, kBlockK, box_rows,
                        jit::CU_TENSOR_MAP_DATA_TYPE_UINT8, jit::CU_TENSOR_MAP_SWIZZLE_128B);
    };
    params.a = fp8(a, am, config.block_m / config.cluster_n);
    params.b = fp8(b, bm, config.block_n / config.cluster_m);
    params.store_staged = config.staged() && dm.columns % 8 == 0;
    if (params.store_staged) {
      const int box = config.box_n();
      params.store =
          matrix_map(d->untyped_data(), dm, 2, box, 16, jit::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                     box == 64   ? jit::CU_TENSOR_MAP_SWIZZLE_128B
                     : box == 32 ? jit::CU_TENSOR_MAP_SWIZZLE_64B
                                 : jit::CU_TENSOR_MAP_SWIZZLE_32B);
    }
    params.a_scale = static_cast<const float*>(a_scale.untyped_data());
    params.b_scale = static_cast<const float*>(b_scale.untyped_data());
    params.d = d->untyped_data();
    params.m = dm.rows;
    params.n = dm.columns;
    params.blocks_n = ceil_div(dm.columns, 128);
    params.blocks_k = ceil_div(am.columns, kBlockK);
    // The tiles that run at once should cover a square of D.
    const double aspect =
        double(config.block_n * config.cluster_n) / (config.block_m * config.cluster_m);
    const int band = std::lround(std::sqrt(clusters * aspect));
    params.order = {rows, columns, static_cast<int>(dm.batch), std::clamp(band, 1, rows)};

    void* args[] = {&params};
    state->kernel.launch(
        {stream, static_cast<unsigned>(clusters * config.cluster()),
         static_cast<unsigned>(config.threads()), static_cast<unsigned>(config.cluster()),
         static_cast<unsigned>(config.smem_bytes()), /*pdl=*/true},
        args);
  });
}

}  // namespace
}  // namespace deepgemm

using deepgemm::GemmState;

XLA_FFI_DEFINE_HANDLER_SYMBOL(GemmInstantiate, deepgemm::instantiate,
                              ffi::Ffi::BindInstantiate()
                                  .Attr<ffi::Span<const int64_t>>("config")
                                  .Attr<std::string_view>("arch")
                                  .Attr<int64_t>("num_sms"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    GemmInitialize, deepgemm::initialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().Ctx<ffi::State<GemmState>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GemmExecute, deepgemm::execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<deepgemm::jit::CUstream>>()
                                  .Ctx<ffi::State<GemmState>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
