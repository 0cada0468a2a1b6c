#include "jit/kernel.h"

#include <map>
#include <memory>
#include <tuple>

namespace deepgemm::jit {
namespace {

struct Before {
  bool operator()(const Variant& a, const Variant& b) const {
    return std::tie(a.source, a.config, a.arch) < std::tie(b.source, b.config, b.arch);
  }
};

struct Slot {
  std::mutex mutex;  // held while the kernel compiles; other variants' slots stay free
  std::unique_ptr<const Kernel> kernel;
};

Slot& slot_of(const Variant& variant) {
  // Never destroyed: XLA's threads may outlive static objects.
  static auto& mutex = *new std::mutex;
  static auto& slots = *new std::map<Variant, Slot, Before>;
  std::lock_guard lock(mutex);
  return slots[variant];
}

}  // namespace

const Kernel& Kernel::get(const Variant& variant) {
  Slot& slot = slot_of(variant);
  std::lock_guard lock(slot.mutex);
  if (slot.kernel) {
    ++statistics.memory_hits;
  } else {
    slot.kernel.reset(new Kernel(compile(variant).cubin));
  }
  return *slot.kernel;
}

void Kernel::prepare(int smem_bytes) const {
  const Driver& cuda = driver();
  CUdevice device;
  check("cuCtxGetDevice", cuda.cuCtxGetDevice(&device));
  // A device past the last bit would only be prepared again at each call.
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (prepared_.load(std::memory_order_acquire) & bit) return;

  std::lock_guard lock(mutex_);
  if (!handle_) {
    CUlibrary library;
    check("cuLibraryLoadData", cuda.cuLibraryLoadData(&library, cubin_.data(), nullptr, nullptr, 0,
                                                      nullptr, nullptr, 0));
    check("cuLibraryGetKernel", cuda.cuLibraryGetKernel(&handle_, library, "kernel"));
    cubin_ = std::string();
  }
  check("cuKernelSetAttribute",
        cuda.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes,
                                  handle_, device));
  // The driver loads lazily; this makes it load now, and not in a launch that is being captured.
  CUfunction function;
  check("cuKernelGetFunction", cuda.cuKernelGetFunction(&function, handle_));
  prepared_.fetch_or(bit, std::memory_order_release);
}

void Kernel::launch_with(const Launch& launch, void** parameters) const {
  CUlaunchAttribute attributes[2];
  attributes[0].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attributes[0].value.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  attributes[1].value.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  CUlaunchConfig config = {};
  config.gridDimX = launch.grid;
  config.blockDimX = launch.block;
  config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = launch.smem_bytes;
  config.hStream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = launch.cluster > 1 ? 2 : 1;
  // A CUkernel goes where a CUfunction is asked for; the stream then tells the context.
  const CUfunction function = reinterpret_cast<CUfunction>(handle_);
  check("cuLaunchKernelEx", driver().cuLaunchKernelEx(&config, function, parameters, nullptr));
}

}  // namespace deepgemm::jit
