#include "layout/handler.h"

namespace ffi = xla::ffi;

namespace deepgemm::layout {
namespace {

constexpr char kOp[] = "layout_transpose";

ffi::ErrorOr<std::unique_ptr<State>> instantiate(ffi::Span<const int64_t> config,
                                                 std::string_view arch) {
  return jit::instantiate<State>(kOp, "layout/sm90_transpose.cuh", config, arch);
}

ffi::Error initialize(State* state) {
  return jit::guarded(kOp, [&] { state->kernel.prepare(state->config.smem_bytes()); });
}

ffi::Error execute(jit::CUstream stream, State* state, ffi::AnyBuffer x,
                   ffi::Result<ffi::AnyBuffer> y) {
  return jit::guarded(kOp, [&] {
    const Config& config = state->config;
    const auto dims = x.dimensions();
    Params params = {};
    params.x = jit::address<const unsigned char>(x);
    params.y = jit::address<unsigned char>(*y);
    params.m = dims[dims.size() - 2];
    params.n = dims.back();
    params.tiles =
        TileGrid::of(dims.size() == 3 ? dims.front() : 1, ceil_div(params.m, config.tile()),
                     ceil_div(params.n, config.tile()));
    state->kernel.launch({stream, config.ctas(params), config.threads(), config.smem_bytes()},
                         params);
  });
}

}  // namespace
}  // namespace deepgemm::layout

using deepgemm::layout::State;

XLA_FFI_DEFINE_HANDLER_SYMBOL(TransposeInstantiate, deepgemm::layout::instantiate,
                              ffi::Ffi::BindInstantiate()
                                  .Attr<ffi::Span<const int64_t>>("config")
                                  .Attr<std::string_view>("arch"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    TransposeInitialize, deepgemm::layout::initialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().Ctx<ffi::State<State>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(TransposeExecute, deepgemm::layout::execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<deepgemm::jit::CUstream>>()
                                  .Ctx<ffi::State<State>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
