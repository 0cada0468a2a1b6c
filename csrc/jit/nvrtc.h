// NVRTC, the compiler that turns a kernel's text into a cubin, opened at run time.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace deepgemm::jit {

// `libraries` are the shared objects to open, by full path and in order: NVRTC looks for its
// builtins by bare name when it compiles and only finds them if they are open already. They
// stay open. Both functions throw a sentence if NVRTC cannot be opened.
using Libraries = std::vector<std::string>;

std::pair<int, int> nvrtc_version(const Libraries& libraries);

struct NvrtcOutput {
  std::string error;  // empty, or NVRTC's name for what went wrong
  std::string cubin;
  std::string log;
};

// Compiles the embedded device source of this name; it may #include all others by theirs.
NvrtcOutput nvrtc_compile(const Libraries& libraries, const std::string& source,
                          const std::vector<std::string>& options);

}  // namespace deepgemm::jit
