#include "training/handler.h"

namespace ffi = xla::ffi;

namespace deepgemm::training {
namespace {

constexpr char kOp[] = "swiglu_backward";
constexpr SwigluBackwardConfig config;

ffi::ErrorOr<std::unique_ptr<SwigluBackwardState>> instantiate(std::string_view arch) {
  std::unique_ptr<SwigluBackwardState> state;
  const ffi::Error error = jit::guarded(kOp, [&] {
    state.reset(new SwigluBackwardState{
        jit::Kernel::get({"training/sm90_swiglu_backward.cuh", {}, std::string(arch)})});
  });
  if (error.failure()) return ffi::Unexpected(error);
  return state;
}

ffi::Error initialize(SwigluBackwardState* state) {
  return jit::guarded(kOp, [&] { state->kernel.prepare(config.smem_bytes()); });
}

template <class T>
T* address(const ffi::AnyBuffer& x) {
  return static_cast<T*>(x.untyped_data());
}

ffi::Error execute(jit::CUstream stream, SwigluBackwardState* state, ffi::AnyBuffer h,
                   ffi::AnyBuffer h_scale, ffi::AnyBuffer dy, ffi::AnyBuffer group_sizes,
                   ffi::RemainingArgs weights, ffi::Result<ffi::AnyBuffer> dh,
                   ffi::Result<ffi::AnyBuffer> dh_scale, ffi::Result<ffi::AnyBuffer> t_dh,
                   ffi::Result<ffi::AnyBuffer> t_dh_scale, ffi::Result<ffi::AnyBuffer> t_y,
                   ffi::Result<ffi::AnyBuffer> t_y_scale, ffi::Result<ffi::AnyBuffer> d_weights) {
  return jit::guarded(kOp, [&] {
    const auto dims = dy.dimensions();
    SwigluBackwardParams params = {};
    params.h = address<const unsigned char>(h);
    params.h_scale = address<const float>(h_scale);
    params.dy = dy.untyped_data();
    params.group_sizes = address<const int>(group_sizes);
    if (weights.size()) params.weights = address<const float>(*weights.get<ffi::AnyBuffer>(0));
    params.dh = address<unsigned char>(*dh);
    params.dh_scale = address<float>(*dh_scale);
    params.t_dh = address<unsigned char>(*t_dh);
    params.t_dh_scale = address<float>(*t_dh_scale);
    params.t_y = address<unsigned char>(*t_y);
    params.t_y_scale = address<float>(*t_y_scale);
    params.d_weights = address<float>(*d_weights);
    params.batch = dims.size() == 3 ? dims.front() : 1;
    params.m = dims[dims.size() - 2];
    params.k = dims.back();
    params.groups = group_sizes.dimensions().back();
    params.t_rows = t_y->dimensions().back();

    void* args[] = {&params};
    state->kernel.launch({stream, static_cast<unsigned>(config.ctas(params)),
                          static_cast<unsigned>(config.threads()), /*cluster=*/1,
                          static_cast<unsigned>(config.smem_bytes()), /*pdl=*/true},
                         args);
  });
}

}  // namespace
}  // namespace deepgemm::training

using deepgemm::training::SwigluBackwardState;

XLA_FFI_DEFINE_HANDLER_SYMBOL(SwigluBackwardInstantiate, deepgemm::training::instantiate,
                              ffi::Ffi::BindInstantiate().Attr<std::string_view>("arch"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SwigluBackwardInitialize, deepgemm::training::initialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().Ctx<ffi::State<SwigluBackwardState>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SwigluBackwardExecute, deepgemm::training::execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<deepgemm::jit::CUstream>>()
                                  .Ctx<ffi::State<SwigluBackwardState>>()
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
