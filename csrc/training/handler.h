// XLA's entry points to the training kernels.
#pragma once

#include "jit/handler.h"
#include "training/config.h"

namespace deepgemm::training {

template <class Config>
struct State {
  static inline xla::ffi::TypeId id = {};
  const jit::Kernel& kernel;

  explicit State(std::string_view arch)
      : kernel(jit::Kernel::get({Config::kSource, {}, std::string(arch)})) {}
};

}  // namespace deepgemm::training

XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluForwardInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluForwardInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluForwardExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluBackwardInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluBackwardInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluBackwardExecute);
