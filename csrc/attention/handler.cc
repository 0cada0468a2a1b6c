#include "attention/handler.h"

#include <memory>
#include <string_view>

#include "attention/plan.h"

namespace ffi = xla::ffi;

namespace deepgemm {

int logits_smem_bytes(const std::vector<int>& config) {
  return jit::config_from<attention::Config>(config).smem_bytes();
}

namespace {

constexpr char kLogits[] = "mqa_logits", kTopk[] = "indexer_topk";

ffi::ErrorOr<std::unique_ptr<LogitsState>> instantiate(ffi::Span<const int64_t> config,
                                                       std::string_view arch, int64_t num_sms,
                                                       bool compressed, bool clean) {
  return jit::instantiate<LogitsState>(kLogits, config, arch, num_sms, compressed, clean);
}

ffi::Error initialize(LogitsState* state) {
  return jit::guarded(kLogits, [&] { state->kernel.prepare(state->config.smem_bytes()); });
}

// What prefill and decode have in common. In front of q's last three dims are those of the
// sequences.
attention::Operands operands_of(const LogitsState& state, const ffi::AnyBuffer& q,
                                const ffi::AnyBuffer& keys, const ffi::AnyBuffer& weights,
                                const ffi::AnyBuffer& end, ffi::AnyBuffer& logits) {
  const auto dims = q.dimensions();
  const size_t rank = dims.size();
  attention::Operands x = {};
  x.q = q.untyped_data();
  x.keys = keys.untyped_data();
  x.weights = weights.typed_data<float>();
  x.end = end.typed_data<int>();
  x.logits = logits.untyped_data();
  x.depth = dims[rank - 1];
  x.heads = dims[rank - 2];
  x.queries = dims[rank - 3];
  x.sequences = q.element_count() / (x.queries * x.heads * x.depth);
  x.columns = logits.dimensions().back();
  x.out_float32 = logits.element_type() == ffi::F32;
  x.compressed = state.compressed;
  x.clean = state.clean;
  return x;
}

void launch(jit::CUstream stream, const LogitsState& state, const attention::Operands& operands) {
  state.kernel.launch({stream, state.num_sms, state.config.threads(), state.config.smem_bytes()},
                      attention::params_of(state.config, state.num_sms, operands));
}

ffi::Error execute(jit::CUstream stream, LogitsState* state, ffi::AnyBuffer q, ffi::AnyBuffer keys,
                   ffi::AnyBuffer scales, ffi::AnyBuffer weights, ffi::AnyBuffer start,
                   ffi::AnyBuffer end, ffi::Result<ffi::AnyBuffer> logits) {
  return jit::guarded(kLogits, [&] {
    attention::Operands x = operands_of(*state, q, keys, weights, end, *logits);
    x.scales = scales.untyped_data();
    x.start = start.typed_data<int>();
    x.keys_each = scales.dimensions().back();
    launch(stream, *state, x);
  });
}

ffi::Error execute_paged(jit::CUstream stream, LogitsState* state, ffi::AnyBuffer q,
                         ffi::AnyBuffer cache, ffi::AnyBuffer weights, ffi::AnyBuffer lengths,
                         ffi::AnyBuffer pages, ffi::Result<ffi::AnyBuffer> logits) {
  return jit::guarded(kLogits, [&] {
    const auto dims = cache.dimensions();
    const size_t rank = dims.size();
    attention::Operands x = operands_of(*state, q, cache, weights, lengths, *logits);
    x.keys_each = dims[rank - 2];
    x.cache_pages = dims[rank - 3];
    x.caches = cache.element_count() / (x.cache_pages * x.keys_each * dims[rank - 1]);
    x.pages = pages.typed_data<int>();
    x.max_pages = pages.dimensions().back();
    launch(stream, *state, x);
  });
}

ffi::ErrorOr<std::unique_ptr<TopkState>> instantiate_topk(ffi::Span<const int64_t> config,
                                                          std::string_view arch) {
  return jit::instantiate<TopkState>(kTopk, "attention/sm90_topk.cuh", config, arch);
}

ffi::Error initialize_topk(TopkState* state) {
  return jit::guarded(kTopk, [&] { state->kernel.prepare(attention::TopkConfig::kSmemBytes); });
}

ffi::Error execute_topk(jit::CUstream stream, TopkState* state, ffi::AnyBuffer logits,
                        ffi::Result<ffi::AnyBuffer> indices, ffi::Result<ffi::AnyBuffer> scores) {
  return jit::guarded(kTopk, [&] {
    using Config = attention::TopkConfig;
    const auto dims = logits.dimensions();
    const attention::TopkParams params = {logits.untyped_data(), jit::address<int>(*indices),
                                          scores->untyped_data(), static_cast<int>(dims[1]),
                                          static_cast<int>(indices->dimensions().back())};
    state->kernel.launch({stream, static_cast<int>(dims[0]), Config::kThreads, Config::kSmemBytes},
                         params);
  });
}

}  // namespace
}  // namespace deepgemm

using deepgemm::LogitsState;
using deepgemm::TopkState;

XLA_FFI_DEFINE_HANDLER_SYMBOL(LogitsInstantiate, deepgemm::instantiate,
                              ffi::Ffi::BindInstantiate()
                                  .Attr<ffi::Span<const int64_t>>("config")
                                  .Attr<std::string_view>("arch")
                                  .Attr<int64_t>("num_sms")
                                  .Attr<bool>("compressed")
                                  .Attr<bool>("clean"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LogitsInitialize, deepgemm::initialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().Ctx<ffi::State<LogitsState>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(LogitsExecute, deepgemm::execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<deepgemm::jit::CUstream>>()
                                  .Ctx<ffi::State<LogitsState>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedLogitsExecute, deepgemm::execute_paged,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<deepgemm::jit::CUstream>>()
                                  .Ctx<ffi::State<LogitsState>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(TopkInstantiate, deepgemm::instantiate_topk,
                              ffi::Ffi::BindInstantiate()
                                  .Attr<ffi::Span<const int64_t>>("config")
                                  .Attr<std::string_view>("arch"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    TopkInitialize, deepgemm::initialize_topk,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().Ctx<ffi::State<TopkState>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(TopkExecute, deepgemm::execute_topk,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<deepgemm::jit::CUstream>>()
                                  .Ctx<ffi::State<TopkState>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
