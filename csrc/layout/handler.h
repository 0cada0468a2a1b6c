// XLA's entry points to the transposition.
#pragma once

#include "jit/handler.h"
#include "layout/config.h"

namespace deepgemm::layout {

struct State : jit::State<Config> {
  static inline xla::ffi::TypeId id = {};
  using jit::State<Config>::State;
};

}  // namespace deepgemm::layout

XLA_FFI_DECLARE_HANDLER_SYMBOL(TransposeInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(TransposeInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(TransposeExecute);
