#include "jit/cuda.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace deepgemm::jit {
namespace {

void* open_driver() { return dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); }

template <class Function>
void resolve(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (!function) {
    throw std::runtime_error("The NVIDIA driver is too old: libcuda.so.1 has no " +
                             std::string(name) + ", which came with CUDA 12.");
  }
}

Driver load() {
  void* library = open_driver();
  if (!library) {
    throw std::runtime_error(
        "No NVIDIA driver can be opened on this machine: " + std::string(dlerror()) + ".");
  }
  Driver driver;
#define RESOLVE(name) resolve(library, #name, driver.name)
  RESOLVE(cuGetErrorName);
  RESOLVE(cuGetErrorString);
  RESOLVE(cuCtxGetDevice);
  RESOLVE(cuDeviceGetAttribute);
  RESOLVE(cuLibraryLoadData);
  RESOLVE(cuLibraryGetKernel);
  RESOLVE(cuKernelSetAttribute);
  RESOLVE(cuKernelGetFunction);
  RESOLVE(cuLaunchKernelEx);
  RESOLVE(cuTensorMapEncodeTiled);
#undef RESOLVE
  return driver;
}

}  // namespace

const Driver& driver() {
  static const Driver driver = load();
  return driver;
}

std::optional<int> driver_version() {
  void* library = open_driver();
  if (!library) return std::nullopt;
  auto get = reinterpret_cast<CUresult (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  int version;
  if (!get || get(&version) != CUDA_SUCCESS) return std::nullopt;
  return version;
}

double memory_gbs(CUdevice device) {
  const auto get = [&](CUdevice_attribute attribute) {
    int value = 0;
    driver().cuDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  const double khz = get(CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
  const double bits = get(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  return 2 * khz * bits / 8 / 1e6;  // two transfers a clock
}

void fail(const char* call, CUresult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver().cuGetErrorName(result, &name);
  driver().cuGetErrorString(result, &text);
  throw std::runtime_error(std::string(call) + " failed with " +
                           (name ? name : "error " + std::to_string(result)) +
                           (text ? ": " + std::string(text) : "") + ".");
}

}  // namespace deepgemm::jit
