// XLA's entry point to the kernel of gated MLPs' backward pass.
#pragma once

#include "jit/handler.h"
#include "training/config.h"

namespace deepgemm::training {

struct SwigluBackwardState {
  static inline xla::ffi::TypeId id = {};
  const jit::Kernel& kernel;
};

}  // namespace deepgemm::training

XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluBackwardInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluBackwardInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluBackwardExecute);
