#include "jit/nvrtc.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>

#include "jit/sources.h"

namespace deepgemm::jit {
namespace {

// Declared by hand, as the driver's part in cuda.h is.
enum nvrtcResult : int { NVRTC_SUCCESS = 0 };
using nvrtcProgram = struct _nvrtcProgram*;

struct Nvrtc {
  const char* (*nvrtcGetErrorString)(nvrtcResult);
  nvrtcResult (*nvrtcVersion)(int* major, int* minor);
  nvrtcResult (*nvrtcCreateProgram)(nvrtcProgram*, const char* text, const char* name, int headers,
                                    const char* const* texts, const char* const* names);
  nvrtcResult (*nvrtcDestroyProgram)(nvrtcProgram*);
  nvrtcResult (*nvrtcCompileProgram)(nvrtcProgram, int options, const char* const* option);
  nvrtcResult (*nvrtcGetProgramLogSize)(nvrtcProgram, size_t*);
  nvrtcResult (*nvrtcGetProgramLog)(nvrtcProgram, char*);
  nvrtcResult (*nvrtcGetCUBINSize)(nvrtcProgram, size_t*);
  nvrtcResult (*nvrtcGetCUBIN)(nvrtcProgram, char*);
};

template <class Function>
void resolve(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (!function) throw std::runtime_error("NVRTC has no function " + std::string(name) + ".");
}

Nvrtc load(const Libraries& libraries) {
  if (libraries.empty()) {
    throw std::runtime_error(
        "NVRTC, which compiles the kernels, was not found: install it with "
        "`pip install 'jax[cuda13]'` or `pip install nvidia-cuda-nvrtc`.");
  }
  void* library = nullptr;
  for (const std::string& path : libraries) {
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      throw std::runtime_error(
          "NVRTC, which compiles the kernels, cannot be opened: " + std::string(dlerror()) + ".");
    }
  }
  Nvrtc nvrtc;
#define RESOLVE(name) resolve(library, #name, nvrtc.name)
  RESOLVE(nvrtcGetErrorString);
  RESOLVE(nvrtcVersion);
  RESOLVE(nvrtcCreateProgram);
  RESOLVE(nvrtcDestroyProgram);
  RESOLVE(nvrtcCompileProgram);
  RESOLVE(nvrtcGetProgramLogSize);
  RESOLVE(nvrtcGetProgramLog);
  RESOLVE(nvrtcGetCUBINSize);
  RESOLVE(nvrtcGetCUBIN);
#undef RESOLVE
  return nvrtc;
}

const Nvrtc& nvrtc(const Libraries& libraries) {
  // Never destroyed: XLA's threads may outlive static objects.
  static auto& mutex = *new std::mutex;
  static auto& opened = *new std::map<Libraries, Nvrtc>;
  std::lock_guard lock(mutex);
  auto found = opened.find(libraries);
  if (found == opened.end()) found = opened.emplace(libraries, load(libraries)).first;
  return found->second;
}

std::vector<const char*> pointers(const std::vector<std::string>& strings) {
  std::vector<const char*> result;
  for (const std::string& string : strings) result.push_back(string.c_str());
  return result;
}

struct Program {
  const Nvrtc& api;
  nvrtcProgram handle = nullptr;

  ~Program() {
    if (handle) api.nvrtcDestroyProgram(&handle);
  }

  std::string read(nvrtcResult (*get_size)(nvrtcProgram, size_t*),
                   nvrtcResult (*get)(nvrtcProgram, char*)) const {
    size_t size = 0;
    if (get_size(handle, &size) != NVRTC_SUCCESS) return {};
    std::string bytes(size, '\0');
    if (get(handle, bytes.data()) != NVRTC_SUCCESS) return {};
    return bytes;
  }
};

}  // namespace

std::pair<int, int> nvrtc_version(const Libraries& libraries) {
  int major = 0, minor = 0;
  nvrtc(libraries).nvrtcVersion(&major, &minor);
  return {major, minor};
}

NvrtcOutput nvrtc_compile(const Libraries& libraries, const std::string& source,
                          const std::vector<std::string>& options) {
  const Nvrtc& api = nvrtc(libraries);
  const char* main_text = nullptr;
  std::vector<const char*> names, texts;
  for (const auto& [name, text] : device_sources()) {
    if (name == source) main_text = text.c_str();
    names.push_back(name.c_str());
    texts.push_back(text.c_str());
  }
  if (!main_text) throw std::runtime_error("There is no device source " + source + ".");

  Program program{api};
  nvrtcResult result =
      api.nvrtcCreateProgram(&program.handle, main_text, source.c_str(),
                             static_cast<int>(names.size()), texts.data(), names.data());
  if (result == NVRTC_SUCCESS) {
    result = api.nvrtcCompileProgram(program.handle, static_cast<int>(options.size()),
                                     pointers(options).data());
  }
  NvrtcOutput output;
  if (program.handle) {
    // NVRTC counts the log's terminator in its size, and with ptxas's part appended more than one.
    output.log = program.read(api.nvrtcGetProgramLogSize, api.nvrtcGetProgramLog).c_str();
  }
  if (result == NVRTC_SUCCESS) {
    output.cubin = program.read(api.nvrtcGetCUBINSize, api.nvrtcGetCUBIN);
    if (output.cubin.empty()) output.error = "an empty cubin";
  } else {
    output.error = api.nvrtcGetErrorString(result);
  }
  return output;
}

}  // namespace deepgemm::jit
