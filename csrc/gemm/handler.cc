#include "gemm/handler.h"

#include <exception>
#include <memory>
#include <string>
#include <string_view>

#include "gemm/plan.h"
#include "jit/compile.h"

namespace ffi = xla::ffi;

namespace deepgemm {

ffi::TypeId GemmState::id = {};

int gemm_smem_bytes(const std::vector<int>& config) {
  return jit::config_from<gemm::Config>(config).smem_bytes();
}

namespace {

using gemm::Config;

template <class F>
ffi::Error guarded(F f) {
  try {
    f();
    return ffi::Error::Success();
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("deepgemm_jax: ") + e.what());
  }
}

ffi::ErrorOr<std::unique_ptr<GemmState>> instantiate(ffi::Span<const int64_t> config,
                                                     std::string_view arch, int64_t num_sms) {
  std::unique_ptr<GemmState> state;
  const ffi::Error error = guarded([&] {
    const auto parsed = jit::config_from<Config>(config);
    const auto& kernel =
        jit::Kernel::get({"gemm/sm90.cuh", {config.begin(), config.end()}, std::string(arch)});
    const auto* runs = parsed.groups == gemm::kContiguous
                           ? &jit::Kernel::get({"gemm/runs.cuh", {}, std::string(arch)})
                           : nullptr;
    state.reset(new GemmState{parsed, static_cast<int>(num_sms), kernel, runs});
  });
  if (error.failure()) return ffi::Unexpected(error);
  return state;
}

ffi::Error initialize(GemmState* state) {
  return guarded([&] {
    state->kernel.prepare(state->config.smem_bytes());
    if (state->runs) state->runs->prepare(0);
  });
}

// [rows, columns], or [batch, rows, columns].
gemm::Matrix matrix(const ffi::AnyBuffer& x) {
  const auto dims = x.dimensions();
  const auto length = [&](size_t from_end) {
    return static_cast<uint64_t>(*(dims.end() - from_end));
  };
  return {x.untyped_data(), dims.size() == 3 ? length(3) : 1, length(2), length(1)};
}

// The operands are A and its scale, B and its scale, what tells the groups, and C, which lies in
// D's place; without those that the config has no use for.
ffi::Error execute(jit::CUstream stream, GemmState* state, ffi::RemainingArgs args,
                   ffi::RemainingRets results) {
  return guarded([&] {
    const Config& config = state->config;
    size_t number = 0;
    const auto next = [&] { return args.get<ffi::AnyBuffer>(number++).value(); };
    gemm::Operands operands = {};
    operands.a = matrix(next());
    if (config.scales != gemm::kNoScales) operands.a_scale = next().typed_data<float>();
    operands.b = matrix(next());
    if (config.scales != gemm::kNoScales) operands.b_scale = next().typed_data<float>();
    for (int i = 0; i < gemm::kGroupOperands[config.groups]; ++i) {
      operands.groups[i] = next().typed_data<int>();
    }
    operands.accumulate = number < args.size();
    operands.d = matrix(*results.get<ffi::AnyBuffer>(0).value());
    if (state->runs) {
      auto* spans = results.get<ffi::AnyBuffer>(1).value()->untyped_data();
      operands.spans = static_cast<gemm::Span*>(spans);
    }

    auto [params, clusters] = gemm::plan(config, state->num_sms, operands);
    if (state->runs) {
      void* runs_args[] = {&operands.groups[0], &params.m, &params.num_groups, &params.spans};
      state->runs->launch({stream, 1, gemm::kRunsThreads, 1, 0, /*pdl=*/true}, runs_args);
    }
    void* kernel_args[] = {&params};
    state->kernel.launch(
        {stream, static_cast<unsigned>(clusters * config.cluster()),
         static_cast<unsigned>(config.threads()), static_cast<unsigned>(config.cluster()),
         static_cast<unsigned>(config.smem_bytes()), /*pdl=*/true},
        kernel_args);
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
                                  .RemainingArgs()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});
