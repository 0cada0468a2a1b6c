#include "jit/compile.h"

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <mutex>
#include <optional>
#include <system_error>

#include "jit/cache.h"
#include "jit/nvrtc.h"
#include "jit/sha256.h"
#include "jit/sources.h"

namespace deepgemm::jit {
namespace {

// Never destroyed: XLA's threads may outlive static objects.
auto& settings_mutex = *new std::mutex;
auto& configured = *new Settings;

Settings settings() {
  std::lock_guard lock(settings_mutex);
  return configured;
}

std::string joined(const std::vector<int>& config) {
  std::string text;
  for (int value : config) text += (text.empty() ? "" : ",") + std::to_string(value);
  return text;
}

std::vector<std::string> options(const Variant& variant) {
  return {
      "-std=c++20",
      "-DCONFIG=" + joined(variant.config),
      "--gpu-architecture=" + variant.arch,
      // What host and device share is plain C++, without CUDA's annotations.
      "--device-as-default-execution-space",
      "--ptxas-options=--verbose",
  };
}

const std::string& sources_digest() {
  static const auto& digest = *new std::string([] {
    Sha256 hash;
    for (const auto& [name, text] : device_sources()) hash.field(name).field(text);
    return hash.hex();
  }());
  return digest;
}

// Names and sizes of NVRTC's files stand for its version: names carry it
// (libnvrtc-builtins.so.13.0), sizes tell builds apart. To ask NVRTC itself would open 140 MB to
// load a kernel that is cached.
std::string key_of(const Variant& variant, const Libraries& nvrtc) {
  Sha256 hash;
  hash.field(sources_digest()).field(variant.source);
  for (const std::string& option : options(variant)) hash.field(option);
  for (const std::string& library : nvrtc) {
    std::error_code missing;  // then opening it will say so
    const auto file = std::filesystem::canonical(library, missing);
    hash.field(file.filename().string());
    hash.field(std::to_string(std::filesystem::file_size(file, missing)));
  }
  return hash.hex();
}

// The last lines, where NVRTC counts the errors.
std::string tail(const std::string& log) {
  constexpr size_t kMost = 2000;
  if (log.size() <= kMost) return log;
  const size_t newline = log.find('\n', log.size() - kMost);
  return "...\n" + log.substr(newline == std::string::npos ? log.size() - kMost : newline + 1);
}

[[noreturn]] void fail(const Variant& variant, const NvrtcOutput& output, const std::string& log) {
  throw std::runtime_error(
      "NVRTC could not compile " + variant.source + " with CONFIG=" + joined(variant.config) +
      " for " + variant.arch + " (" + output.error + "). " +
      (log.empty() ? "Its whole log could not be written anywhere" : "Its whole log is in " + log) +
      ", and ends:\n" + tail(output.log));
}

void warn_once(const std::string& cache_dir, const std::error_code& error) {
  static std::once_flag once;
  std::call_once(once, [&] {
    std::fprintf(stderr,
                 "deepgemm_jax: the kernel cache %s cannot be written (%s), so that every process "
                 "compiles its kernels anew.\n",
                 cache_dir.c_str(), error.message().c_str());
  });
}

Compilation find_or_compile(const Variant& variant) {
  const Settings now = settings();
  const std::string key = key_of(variant, now.nvrtc);
  const Cache cache(now.cache_dir);
  const auto find = [&]() -> std::optional<Compilation> {
    auto entry = cache.load(key);
    if (!entry) return std::nullopt;
    ++statistics.disk_hits;
    return Compilation{std::move(entry->cubin), std::move(entry->log), true, 0};
  };

  if (auto found = find()) return *std::move(found);
  const Cache::Lock lock = cache.lock(key);
  if (auto found = find()) return *std::move(found);  // compiled by whom we waited for

  NvrtcOutput output = nvrtc_compile(now.nvrtc, variant.source, options(variant));
  if (!output.error.empty()) fail(variant, output, cache.store_log(key, output.log));
  ++statistics.compiled;
  if (const auto error = cache.store(key, {output.cubin, output.log})) {
    warn_once(now.cache_dir, error);
  }
  return {std::move(output.cubin), std::move(output.log), false, 0};
}

}  // namespace

void configure(Settings settings) {
  std::lock_guard lock(settings_mutex);
  configured = std::move(settings);
}

Compilation compile(const Variant& variant) {
  const auto start = std::chrono::steady_clock::now();
  Compilation compilation = find_or_compile(variant);
  compilation.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return compilation;
}

std::pair<int, int> nvrtc_version() { return nvrtc_version(settings().nvrtc); }

}  // namespace deepgemm::jit
