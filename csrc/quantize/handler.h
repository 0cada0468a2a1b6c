// XLA's entry points to the quantising kernels.
#pragma once

#include "jit/handler.h"
#include "quantize/config.h"

namespace deepgemm::quantize {

template <class Config>
struct State : jit::State<Config> {
  static inline xla::ffi::TypeId id = {};
  int round_up;

  State(const char* source, xla::ffi::Span<const int64_t> config, std::string_view arch,
        int round_up)
      : jit::State<Config>(source, config, arch), round_up(round_up) {}
};

using RowsState = State<RowsConfig>;
using TilesState = State<TilesConfig>;

}  // namespace deepgemm::quantize

XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizeRowsInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizeRowsInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizeRowsExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizeTilesInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizeTilesInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizeTilesExecute);
