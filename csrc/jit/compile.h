// From a kernel variant to its cubin: through the disk cache, or NVRTC.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace deepgemm::jit {

// What Python decides. Before it has, there is no cache and no compiler.
struct Settings {
  std::string cache_dir;           // empty: no disk cache
  std::vector<std::string> nvrtc;  // shared objects in the order to open them, libnvrtc last
};
void configure(Settings settings);

// A device source with the integers that its CONFIG macro stands for, for one architecture. Its
// entry point is `extern "C" __global__ void kernel(...)`.
struct Variant {
  std::string source;       // name relative to csrc: "gemm/sm90.cuh"
  std::vector<int> config;  // see config_from
  std::string arch;         // "sm_90a"
};

struct Compilation {
  std::string cubin;
  std::string log;  // registers and spills as ptxas reports them, and warnings; the cache keeps it
  bool cached;      // found on disk
  double seconds;
};

// Needs no GPU. At most one process compiles a variant at a time, and only if no cache entry of the
// same sources, options, architecture and NVRTC is there. Throws a sentence with the end of NVRTC's
// log and the path of all of it.
Compilation compile(const Variant& variant);

std::pair<int, int> nvrtc_version();  // throws a sentence if there is no NVRTC

// What this process did so far.
struct Statistics {
  std::atomic<int64_t> compiled;     // by NVRTC
  std::atomic<int64_t> disk_hits;    // found in the disk cache
  std::atomic<int64_t> memory_hits;  // asked of Kernel::get again
};
inline Statistics statistics{};

// A Config is an aggregate of ints; Python lists their values in the order of its fields.
template <class Config, class Ints>
Config config_from(const Ints& values) {
  static_assert(std::is_trivially_copyable_v<Config> && sizeof(Config) % sizeof(int) == 0);
  const std::vector<int> ints(values.begin(), values.end());
  if (ints.size() * sizeof(int) != sizeof(Config)) {
    throw std::runtime_error("A config of " + std::to_string(sizeof(Config) / sizeof(int)) +
                             " integers was expected, but it has " + std::to_string(ints.size()) +
                             ".");
  }
  Config config;
  std::memcpy(&config, ints.data(), sizeof config);
  return config;
}

}  // namespace deepgemm::jit
