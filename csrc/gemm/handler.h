// XLA's entry points to the GEMMs, dense and grouped.
#pragma once

#include <string_view>
#include <variant>
#include <vector>

#include "gemm/config.h"
#include "jit/handler.h"

namespace deepgemm {

// One for each call site, shared by the devices that execute it.
struct GemmState {
  static xla::ffi::TypeId id;
  std::variant<gemm::Config, gemm::FewRows> config;
  int num_sms;  // that the kernel may fill
  const jit::Kernel& kernel;
  const jit::Kernel* runs = nullptr;  // finds the groups first, where rows are told by id

  GemmState(std::string_view source, xla::ffi::Span<const int64_t> config, std::string_view arch,
            int64_t num_sms, bool by_id);
};

int gemm_smem_bytes(std::string_view source, const std::vector<int>& config);

}  // namespace deepgemm

XLA_FFI_DECLARE_HANDLER_SYMBOL(GemmInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(GemmInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(GemmExecute);
