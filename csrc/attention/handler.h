// XLA's entry points to the indexer's kernels.
#pragma once

#include <string_view>
#include <vector>

#include "attention/config.h"
#include "jit/handler.h"

namespace deepgemm {

struct LogitsState : jit::State<attention::Config> {
  static inline xla::ffi::TypeId id = {};
  int num_sms;  // that the kernel may fill
  bool compressed, clean;

  LogitsState(xla::ffi::Span<const int64_t> config, std::string_view arch, int64_t num_sms,
              bool compressed, bool clean)
      : State("attention/sm90_logits.cuh", config, arch),
        num_sms(static_cast<int>(num_sms)),
        compressed(compressed),
        clean(clean) {}
};

struct TopkState : jit::State<attention::TopkConfig> {
  static inline xla::ffi::TypeId id = {};
  using State::State;
};

int logits_smem_bytes(const std::vector<int>& config);

}  // namespace deepgemm

XLA_FFI_DECLARE_HANDLER_SYMBOL(LogitsInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(LogitsInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(LogitsExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(PagedLogitsExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(TopkInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(TopkInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(TopkExecute);
