// A kernel that can be launched.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include "jit/compile.h"
#include "jit/cuda.h"

namespace deepgemm::jit {

struct Launch {
  CUstream stream;
  int grid;         // CTAs
  int block;        // threads a CTA
  int smem_bytes;   // dynamic shared memory a CTA
  int cluster = 1;  // CTAs a cluster
};

// One for each variant, for the life of the process, shared by all threads, devices and call sites.
// The methods are for the stages of XLA's FFI: what is slow happens in the first two.
class Kernel {
 public:
  // Instantiate: compiles here and now if need be. Calls for one variant compile it once.
  static const Kernel& get(const Variant& variant);

  // Initialize: readies the current context's device for launches with this much dynamic shared
  // memory, always the same for a variant. All but a device's first call cost nanoseconds.
  void prepare(int smem_bytes) const;

  // Execute, with the kernel's parameters. It may begin before the stream's last kernel has ended,
  // and waits for that itself (griddepcontrol).
  template <class... Parameters>
  void launch(const Launch& launch, Parameters... parameters) const {
    void* addresses[] = {&parameters...};
    launch_with(launch, addresses);
  }

 private:
  void launch_with(const Launch& launch, void** parameters) const;

  explicit Kernel(std::string cubin) : cubin_(std::move(cubin)) {}

  // What prepare() does, it does once, under the mutex.
  mutable std::mutex mutex_;
  mutable std::string cubin_;          // until the driver has it
  mutable CUkernel handle_ = nullptr;  // of no context: the driver finds the stream's device
  mutable std::atomic<uint64_t> prepared_{0};  // bit i: device i
};

}  // namespace deepgemm::jit
