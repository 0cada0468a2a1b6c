#include "quantize/handler.h"

namespace ffi = xla::ffi;

namespace deepgemm::quantize {
namespace {

using jit::address;

constexpr char kOp[] = "quantize";

ffi::ErrorOr<std::unique_ptr<RowsState>> rows_instantiate(ffi::Span<const int64_t> config,
                                                          std::string_view arch, int64_t round_up) {
  return jit::instantiate<RowsState>(kOp, "quantize/sm90_rows.cuh", config, arch, round_up);
}

ffi::ErrorOr<std::unique_ptr<TilesState>> tiles_instantiate(ffi::Span<const int64_t> config,
                                                            std::string_view arch,
                                                            int64_t round_up) {
  return jit::instantiate<TilesState>(kOp, "quantize/sm90_tiles.cuh", config, arch, round_up);
}

ffi::Error rows_initialize(RowsState* state) {
  return jit::guarded(kOp, [&] { state->kernel.prepare(/*smem_bytes=*/0); });
}

ffi::Error tiles_initialize(TilesState* state) {
  return jit::guarded(kOp, [&] { state->kernel.prepare(state->config.smem_bytes()); });
}

ffi::Error rows_execute(jit::CUstream stream, RowsState* state, ffi::AnyBuffer x,
                        ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> data,
                        ffi::RemainingRets rest) {
  return jit::guarded(kOp, [&] {
    const RowsConfig& config = state->config;
    size_t taken = 0;  // of the operands behind x
    const auto next = [&] { return *more.get<ffi::AnyBuffer>(taken++); };
    RowsParams params = {};
    params.x = x.untyped_data();
    if (config.backward()) params.dy = next().untyped_data();
    if (config.function == kScaled) params.scale = address<float>(next());
    if (taken < more.size()) params.weights = address<const float>(next());
    params.data = address<unsigned char>(*data);
    if (config.function != kScaled) params.scale = address<float>(**rest.get<ffi::AnyBuffer>(0));
    if (config.backward()) params.d_weights = address<float>(**rest.get<ffi::AnyBuffer>(1));
    params.m = x.dimensions()[0];
    params.k = x.dimensions()[1] / (config.gated() ? 2 : 1);
    params.round_up = state->round_up;
    params.by_blocks = Divisor::of(params.blocks());
    state->kernel.launch({stream, config.ctas(params), config.threads(), /*smem_bytes=*/0}, params);
  });
}

ffi::Error tiles_execute(jit::CUstream stream, TilesState* state, ffi::AnyBuffer x,
                         ffi::RemainingArgs group_sizes, ffi::Result<ffi::AnyBuffer> data,
                         ffi::Result<ffi::AnyBuffer> scale, ffi::RemainingRets transposed) {
  return jit::guarded(kOp, [&] {
    const TilesConfig& config = state->config;
    const auto dims = x.dimensions();
    TilesParams params = {};
    params.x = x.untyped_data();
    params.data = address<unsigned char>(*data);
    params.scale = address<float>(*scale);
    params.m = dims[dims.size() - 2];
    params.k = dims.back();
    params.t_rows = params.m;
    if (transposed.size()) {
      ffi::Result<ffi::AnyBuffer> t_data = *transposed.get<ffi::AnyBuffer>(0);
      params.t_data = address<unsigned char>(*t_data);
      params.t_scale = address<float>(**transposed.get<ffi::AnyBuffer>(1));
      params.t_rows = t_data->dimensions().back();
    }
    params.round_up = state->round_up;
    params.tiles = TileGrid::of(dims.size() == 3 ? dims.front() : 1,
                                ceil_div(params.t_rows, kBlock), ceil_div(params.k, kBlock));
    if (group_sizes.size()) {
      const auto sizes = *group_sizes.get<ffi::AnyBuffer>(0);
      params.group_sizes = address<const int>(sizes);
      params.groups = sizes.dimensions().back();
    }
    state->kernel.launch({stream, config.ctas(params), config.threads(), config.smem_bytes()},
                         params);
  });
}

}  // namespace
}  // namespace deepgemm::quantize

using deepgemm::jit::CUstream;
using deepgemm::quantize::RowsState;
using deepgemm::quantize::TilesState;

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeRowsInstantiate, deepgemm::quantize::rows_instantiate,
                              ffi::Ffi::BindInstantiate()
                                  .Attr<ffi::Span<const int64_t>>("config")
                                  .Attr<std::string_view>("arch")
                                  .Attr<int64_t>("round_up"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    QuantizeRowsInitialize, deepgemm::quantize::rows_initialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().Ctx<ffi::State<RowsState>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeRowsExecute, deepgemm::quantize::rows_execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<CUstream>>()
                                  .Ctx<ffi::State<RowsState>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeTilesInstantiate, deepgemm::quantize::tiles_instantiate,
                              ffi::Ffi::BindInstantiate()
                                  .Attr<ffi::Span<const int64_t>>("config")
                                  .Attr<std::string_view>("arch")
                                  .Attr<int64_t>("round_up"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    QuantizeTilesInitialize, deepgemm::quantize::tiles_initialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().Ctx<ffi::State<TilesState>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeTilesExecute, deepgemm::quantize::tiles_execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<CUstream>>()
                                  .Ctx<ffi::State<TilesState>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});
