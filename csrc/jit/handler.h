// What XLA's entry points to kernels have in common.
#pragma once

#include <exception>
#include <memory>
#include <string>
#include <string_view>

#include "jit/kernel.h"
#include "xla/ffi/api/ffi.h"

namespace deepgemm::jit {

// XLA wants no exceptions: `op` and what one says become an error.
template <class F>
xla::ffi::Error guarded(const char* op, F f) {
  try {
    f();
    return xla::ffi::Error::Success();
  } catch (const std::exception& e) {
    return xla::ffi::Error::Internal(std::string(op) + ": " + e.what());
  }
}

template <class T>
T* address(const xla::ffi::AnyBuffer& x) {
  return static_cast<T*>(x.untyped_data());
}

// The state of a call site, which the devices that execute it share. A kernel family adds to it.
template <class Config>
struct State {
  Config config;
  const Kernel& kernel;

  State(const char* source, xla::ffi::Span<const int64_t> config, std::string_view arch)
      : config(config_from<Config>(config)),
        kernel(Kernel::get({source, {config.begin(), config.end()}, std::string(arch)})) {}
};

// A new state, from its constructor's arguments.
template <class State, class... Args>
xla::ffi::ErrorOr<std::unique_ptr<State>> instantiate(const char* op, Args... args) {
  std::unique_ptr<State> state;
  const xla::ffi::Error error = guarded(op, [&] { state = std::make_unique<State>(args...); });
  if (error.failure()) return xla::ffi::Unexpected(error);
  return state;
}

}  // namespace deepgemm::jit
