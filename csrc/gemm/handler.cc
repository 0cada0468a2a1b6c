#include "gemm/handler.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

#include "gemm/plan.h"
#include "jit/compile.h"

namespace ffi = xla::ffi;

namespace deepgemm {

ffi::TypeId GemmState::id = {};

namespace {

using AnyConfig = decltype(GemmState::config);

template <class Ints>
AnyConfig config_of(std::string_view source, const Ints& ints) {
  if (source == "gemm/sm90.cuh") return jit::config_from<gemm::Config>(ints);
  if (source == "gemm/sm90_few_rows.cuh") return jit::config_from<gemm::FewRows>(ints);
  throw std::runtime_error("There is no kernel " + std::string(source) + ".");
}

int smem_bytes(const AnyConfig& config) {
  return std::visit([](const auto& c) { return c.smem_bytes(); }, config);
}

constexpr char kOp[] = "gemm";

ffi::ErrorOr<std::unique_ptr<GemmState>> instantiate(std::string_view source,
                                                     ffi::Span<const int64_t> config,
                                                     std::string_view arch, int64_t num_sms,
                                                     bool by_id) {
  return jit::instantiate<GemmState>(kOp, source, config, arch, num_sms, by_id);
}

ffi::Error initialize(GemmState* state) {
  return jit::guarded(kOp, [&] {
    state->kernel.prepare(smem_bytes(state->config));
    if (state->runs) state->runs->prepare(gemm::kRunsSharedBytes);
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

// A and its scale, B and its scale, and what tells the groups, without those that the kernel has no
// use for. C, which comes last, lies in D's place.
gemm::Operands operands_of(const ffi::RemainingArgs& args, ffi::RemainingRets& results, int scales,
                           int groups, bool by_id) {
  size_t number = 0;
  const auto next = [&] { return args.get<ffi::AnyBuffer>(number++).value(); };
  gemm::Operands x = {};
  x.a = matrix(next());
  if (scales != gemm::kNoScales) x.a_scale = next().typed_data<float>();
  x.b = matrix(next());
  if (scales != gemm::kNoScales) x.b_scale = next().typed_data<float>();
  const int told = gemm::group_operands(groups, by_id);
  for (int i = 0; i < told; ++i) x.groups[i] = next().typed_data<int>();
  x.d = matrix(*results.get<ffi::AnyBuffer>(0).value());
  if (by_id) {
    auto* spans = results.get<ffi::AnyBuffer>(1).value()->untyped_data();
    x.spans = static_cast<gemm::Span*>(spans);
  }
  return x;
}

template <class Config>
void launch(const Config& config, const GemmState& state, jit::CUstream stream,
            const gemm::Operands& operands) {
  const auto [params, clusters] = gemm::plan(config, state.num_sms, operands);
  if (state.runs) {
    state.runs->launch({stream, gemm::kRunsCtas, gemm::kRunsThreads, gemm::kRunsSharedBytes,
                        /*cluster=*/gemm::kRunsCtas},
                       operands.groups[0], params.m, params.num_groups, params.spans);
  }
  state.kernel.launch({stream, clusters * config.cluster(), config.threads(), config.smem_bytes(),
                       config.cluster()},
                      params);
}

ffi::Error execute(jit::CUstream stream, GemmState* state, ffi::RemainingArgs args,
                   ffi::RemainingRets results) {
  return jit::guarded(kOp, [&] {
    std::visit(
        [&](const auto& config) {
          launch(config, *state, stream,
                 operands_of(args, results, config.scales, config.groups, state->runs != nullptr));
        },
        state->config);
  });
}

}  // namespace

GemmState::GemmState(std::string_view source, ffi::Span<const int64_t> ints, std::string_view arch,
                     int64_t num_sms, bool by_id)
    : config(config_of(source, ints)),
      num_sms(static_cast<int>(num_sms)),
      kernel(
          jit::Kernel::get({std::string(source), {ints.begin(), ints.end()}, std::string(arch)})) {
  if (by_id) runs = &jit::Kernel::get({"gemm/runs.cuh", {}, std::string(arch)});
}

int gemm_smem_bytes(std::string_view source, const std::vector<int>& config) {
  return smem_bytes(config_of(source, config));
}

}  // namespace deepgemm

using deepgemm::GemmState;

XLA_FFI_DEFINE_HANDLER_SYMBOL(GemmInstantiate, deepgemm::instantiate,
                              ffi::Ffi::BindInstantiate()
                                  .Attr<std::string_view>("source")
                                  .Attr<ffi::Span<const int64_t>>("config")
                                  .Attr<std::string_view>("arch")
                                  .Attr<int64_t>("num_sms")
                                  .Attr<bool>("by_id"));

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
