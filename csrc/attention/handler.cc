#include "attention/handler.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <string_view>

#include "jit/compile.h"
#include "jit/tensor_map.h"

namespace ffi = xla::ffi;

namespace deepgemm {

ffi::TypeId LogitsState::id = {};
ffi::TypeId TopkState::id = {};

int logits_smem_bytes(const std::vector<int>& config) {
  return jit::config_from<attention::Config>(config).smem_bytes();
}

namespace {

using attention::kRowBytes;

template <class F>
ffi::Error guarded(const char* op, F f) {
  try {
    f();
    return ffi::Error::Success();
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string(op) + ": " + e.what());
  }
}

ffi::ErrorOr<std::unique_ptr<LogitsState>> instantiate(ffi::Span<const int64_t> config,
                                                       std::string_view arch, int64_t num_sms,
                                                       bool compressed, bool clean) {
  std::unique_ptr<LogitsState> state;
  const ffi::Error error = guarded("mqa_logits", [&] {
    const auto& kernel = jit::Kernel::get(
        {"attention/sm90_logits.cuh", {config.begin(), config.end()}, std::string(arch)});
    state.reset(new LogitsState{jit::config_from<attention::Config>(config),
                                static_cast<int>(num_sms), compressed, clean, kernel});
  });
  if (error.failure()) return ffi::Unexpected(error);
  return state;
}

ffi::Error initialize(LogitsState* state) {
  return guarded("mqa_logits", [&] { state->kernel.prepare(state->config.smem_bytes()); });
}

// A tensor of bytes of which a row fills one of shared memory.
jit::CUtensorMap byte_map(const void* address, uint64_t row, uint64_t rows, uint64_t matrices,
                          uint64_t matrix_stride, uint32_t box_rows, uint32_t box_matrices) {
  return jit::tensor_map(address, jit::CU_TENSOR_MAP_DATA_TYPE_UINT8, {row, rows, matrices},
                         {row, matrix_stride}, {kRowBytes, box_rows, box_matrices},
                         jit::CU_TENSOR_MAP_SWIZZLE_128B);
}

// Of rows of scales, a row or part of one at a time.
jit::CUtensorMap scale_map(const void* address, uint64_t count, uint64_t rows, uint64_t stride,
                           uint32_t box) {
  return jit::tensor_map(address, jit::CU_TENSOR_MAP_DATA_TYPE_FLOAT32, {count, rows, 1},
                         {stride, stride * rows}, {box, 1, 1}, jit::CU_TENSOR_MAP_SWIZZLE_NONE);
}

// The part that does not depend on where keys are. In front of q's last three dims are those of the
// sequences.
attention::Params params_of(const LogitsState& state, const ffi::AnyBuffer& q,
                            const ffi::AnyBuffer& weights, const ffi::AnyBuffer& end,
                            ffi::AnyBuffer& logits) {
  const auto dims = q.dimensions();
  const size_t rank = dims.size();
  const uint64_t depth = dims[rank - 1], heads = dims[rank - 2], queries = dims[rank - 3];
  const uint64_t sequences = q.element_count() / (queries * heads * depth);
  attention::Params params = {};
  params.q = byte_map(q.untyped_data(), depth, heads, sequences * queries, heads * depth,
                      state.config.heads, state.config.block_queries());
  params.weights = static_cast<const float*>(weights.untyped_data());
  params.end = static_cast<const int*>(end.untyped_data());
  params.logits = logits.untyped_data();
  params.sequences = sequences;
  params.queries = queries;
  params.heads = heads;
  params.columns = logits.dimensions().back();
  params.out_float32 = logits.element_type() == ffi::F32;
  params.compressed = state.compressed;
  params.clean = state.clean;
  return params;
}

void launch(jit::CUstream stream, const LogitsState& state, attention::Params& params) {
  void* args[] = {&params};
  state.kernel.launch(
      {stream, static_cast<unsigned>(state.num_sms), static_cast<unsigned>(state.config.threads()),
       /*cluster=*/1, static_cast<unsigned>(state.config.smem_bytes()), /*pdl=*/true},
      args);
}

ffi::Error execute(jit::CUstream stream, LogitsState* state, ffi::AnyBuffer q, ffi::AnyBuffer keys,
                   ffi::AnyBuffer scales, ffi::AnyBuffer weights, ffi::AnyBuffer start,
                   ffi::AnyBuffer end, ffi::Result<ffi::AnyBuffer> logits) {
  return guarded("mqa_logits", [&] {
    const uint64_t depth = keys.dimensions().back();
    const uint64_t count = scales.element_count();  // of all sequences
    attention::Params params = params_of(*state, q, weights, end, *logits);
    const int box = state->config.block_keys();
    params.keys = byte_map(keys.untyped_data(), depth, count, 1, count * depth, box, 1);
    // The copy engine wants strides that are multiples of 16, of a single row too.
    params.scales = scale_map(scales.untyped_data(), count, 1, (count * 4 + 15) / 16 * 16, box);
    params.start = static_cast<const int*>(start.untyped_data());
    params.keys_end = scales.dimensions().back();
    params.page_keys = box;
    launch(stream, *state, params);
  });
}

ffi::Error execute_paged(jit::CUstream stream, LogitsState* state, ffi::AnyBuffer q,
                         ffi::AnyBuffer cache, ffi::AnyBuffer weights, ffi::AnyBuffer lengths,
                         ffi::AnyBuffer pages, ffi::Result<ffi::AnyBuffer> logits) {
  return guarded("mqa_logits", [&] {
    const auto dims = cache.dimensions();
    const size_t rank = dims.size();
    const uint64_t depth = q.dimensions().back();
    const uint64_t page_keys = dims[rank - 2], page_bytes = page_keys * dims[rank - 1];
    const uint64_t all_pages = cache.element_count() / page_bytes;
    attention::Params params = params_of(*state, q, weights, lengths, *logits);
    params.keys =
        byte_map(cache.untyped_data(), depth, page_keys, all_pages, page_bytes, page_keys, 1);
    params.scales = scale_map(static_cast<const char*>(cache.untyped_data()) + page_keys * depth,
                              page_keys, all_pages, page_bytes, page_keys);
    params.pages = static_cast<const int*>(pages.untyped_data());
    params.page_keys = page_keys;
    params.max_pages = pages.dimensions().back();
    params.cache_pages = dims[rank - 3];
    params.cache_share = params.sequences / (all_pages / params.cache_pages);
    params.keys_end = std::min<int64_t>(params.columns, params.max_pages * int64_t(page_keys));
    launch(stream, *state, params);
  });
}

ffi::ErrorOr<std::unique_ptr<TopkState>> instantiate_topk(ffi::Span<const int64_t> config,
                                                          std::string_view arch) {
  std::unique_ptr<TopkState> state;
  const ffi::Error error = guarded("indexer_topk", [&] {
    state.reset(new TopkState{jit::Kernel::get(
        {"attention/sm90_topk.cuh", {config.begin(), config.end()}, std::string(arch)})});
  });
  if (error.failure()) return ffi::Unexpected(error);
  return state;
}

ffi::Error initialize_topk(TopkState* state) {
  return guarded("indexer_topk", [&] { state->kernel.prepare(attention::TopkConfig::kSmemBytes); });
}

ffi::Error execute_topk(jit::CUstream stream, TopkState* state, ffi::AnyBuffer logits,
                        ffi::Result<ffi::AnyBuffer> indices, ffi::Result<ffi::AnyBuffer> scores) {
  return guarded("indexer_topk", [&] {
    using Config = attention::TopkConfig;
    const auto dims = logits.dimensions();
    attention::TopkParams params = {
        logits.untyped_data(), static_cast<int*>(indices->untyped_data()), scores->untyped_data(),
        static_cast<int>(dims[1]), static_cast<int>(indices->dimensions().back())};
    void* args[] = {&params};
    state->kernel.launch({stream, static_cast<unsigned>(dims[0]), Config::kThreads,
                          /*cluster=*/1, Config::kSmemBytes, /*pdl=*/true},
                         args);
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
