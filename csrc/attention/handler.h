// XLA's entry points to the indexer's kernels.
#pragma once

#include <vector>

#include "attention/config.h"
#include "jit/kernel.h"
#include "xla/ffi/api/ffi.h"

namespace deepgemm {

// One for each call site, shared by the devices that execute it.
struct LogitsState {
  static xla::ffi::TypeId id;
  attention::Config config;
  int num_sms;  // that the kernel may fill
  bool compressed, clean;
  const jit::Kernel& kernel;
};

struct TopkState {
  static xla::ffi::TypeId id;
  const jit::Kernel& kernel;
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
