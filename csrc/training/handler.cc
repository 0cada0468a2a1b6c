#include "training/handler.h"

namespace ffi = xla::ffi;

namespace deepgemm::training {
namespace {

using jit::address;

constexpr char kOp[] = "training";

template <class Config>
ffi::ErrorOr<std::unique_ptr<State<Config>>> instantiate(std::string_view arch) {
  return jit::instantiate<State<Config>>(kOp, arch);
}

template <class Config>
ffi::Error initialize(State<Config>* state) {
  return jit::guarded(kOp, [&] { state->kernel.prepare(Config().smem_bytes()); });
}

template <class Config>
void launch(const State<Config>& state, jit::CUstream stream,
            const typename Config::Params& params) {
  constexpr Config config;
  state.kernel.launch({stream, config.ctas(params), config.threads(), config.smem_bytes()}, params);
}

const float* weights_of(ffi::RemainingArgs args) {
  return args.size() ? address<const float>(*args.get<ffi::AnyBuffer>(0)) : nullptr;
}

using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error forward(jit::CUstream stream, State<SwigluForward>* state, ffi::AnyBuffer h,
                   ffi::RemainingArgs weights, Result y, Result y_scale, Result kept,
                   Result kept_scale) {
  return jit::guarded(kOp, [&] {
    SwigluForwardParams params = {};
    params.h = h.untyped_data();
    params.weights = weights_of(weights);
    params.y = address<unsigned char>(*y);
    params.y_scale = address<float>(*y_scale);
    params.kept = address<unsigned char>(*kept);
    params.kept_scale = address<float>(*kept_scale);
    params.m = h.dimensions()[0];
    params.k = h.dimensions()[1] / 2;
    params.by_blocks = Divisor::of(params.blocks());
    launch(*state, stream, params);
  });
}

ffi::Error backward(jit::CUstream stream, State<SwigluBackward>* state, ffi::AnyBuffer h,
                    ffi::AnyBuffer h_scale, ffi::AnyBuffer dy, ffi::AnyBuffer group_sizes,
                    ffi::RemainingArgs weights, Result dh, Result dh_scale, Result t_dh,
                    Result t_dh_scale, Result t_y, Result t_y_scale, Result d_weights) {
  return jit::guarded(kOp, [&] {
    const auto dims = dy.dimensions();
    SwigluBackwardParams params = {};
    params.h = address<const unsigned char>(h);
    params.h_scale = address<const float>(h_scale);
    params.dy = dy.untyped_data();
    params.group_sizes = address<const int>(group_sizes);
    params.weights = weights_of(weights);
    params.dh = address<unsigned char>(*dh);
    params.dh_scale = address<float>(*dh_scale);
    params.t_dh = address<unsigned char>(*t_dh);
    params.t_dh_scale = address<float>(*t_dh_scale);
    params.t_y = address<unsigned char>(*t_y);
    params.t_y_scale = address<float>(*t_y_scale);
    params.d_weights = address<float>(*d_weights);
    params.m = dims[dims.size() - 2];
    params.k = dims.back();
    params.groups = group_sizes.dimensions().back();
    params.t_rows = t_y->dimensions().back();
    params.tiles = TileGrid::of(dims.size() == 3 ? dims.front() : 1, params.t_rows / kBlock,
                                params.k / kBlock);
    launch(*state, stream, params);
  });
}

template <class Config>
auto initialize_binding() {
  return ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().Ctx<ffi::State<State<Config>>>();
}

auto instantiate_binding() { return ffi::Ffi::BindInstantiate().Attr<std::string_view>("arch"); }

}  // namespace
}  // namespace deepgemm::training

using namespace deepgemm::training;

XLA_FFI_DEFINE_HANDLER_SYMBOL(SwigluForwardInstantiate, instantiate<SwigluForward>,
                              instantiate_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SwigluForwardInitialize, initialize<SwigluForward>,
                              initialize_binding<SwigluForward>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SwigluForwardExecute, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<deepgemm::jit::CUstream>>()
                                  .Ctx<ffi::State<State<SwigluForward>>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SwigluBackwardInstantiate, instantiate<SwigluBackward>,
                              instantiate_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SwigluBackwardInitialize, initialize<SwigluBackward>,
                              initialize_binding<SwigluBackward>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SwigluBackwardExecute, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<deepgemm::jit::CUstream>>()
                                  .Ctx<ffi::State<State<SwigluBackward>>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
