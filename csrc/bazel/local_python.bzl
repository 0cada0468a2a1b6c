"""The Python that PYTHON_BIN_PATH names (else python3), with what an extension for it needs."""

_PROBE = """
import sys, sysconfig
from importlib.util import find_spec
nanobind, jaxlib = (find_spec(name).submodule_search_locations[0] for name in ("nanobind", "jaxlib"))
print(sys.executable, sysconfig.get_path("include"), nanobind, jaxlib + "/include", sep="\\n")
"""

# The options of nanobind are those that its src/nb_combined.cpp gives for other build systems.
_BUILD = """
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "python",
    hdrs = glob(["python/**/*.h"]),
    includes = ["python"],
)

cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"],
    hdrs = glob(["nanobind/**/*.h"]),
    copts = "-std=c++17 -O3 -w -fvisibility=hidden -fno-strict-aliasing".split(" "),
    defines = ["NDEBUG", "NB_COMPACT_ASSERTIONS"],
    includes = ["nanobind/include", "nanobind/ext/robin_map/include"],
    textual_hdrs = glob(["nanobind/src/*.cpp"], exclude = ["nanobind/src/nb_combined.cpp"]),
    deps = [":python"],
)

cc_library(
    name = "xla_ffi",
    hdrs = glob(["jaxlib/xla/ffi/api/*.h"]),
    includes = ["jaxlib"],
)

# Bazel's launcher of a Python program would otherwise ask the PATH for one called `python`.
py_runtime(
    name = "runtime",
    interpreter_path = "{python}",
    python_version = "PY3",
    stub_shebang = "#!{python}",
)

py_runtime_pair(
    name = "runtimes",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtimes",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

def _local_python_impl(ctx):
    python = ctx.os.environ.get("PYTHON_BIN_PATH") or str(ctx.which("python3"))
    probe = ctx.execute([python, "-c", _PROBE])
    if probe.return_code:
        fail("%s lacks nanobind or jaxlib; name another by PYTHON_BIN_PATH.\n%s" % (python, probe.stderr))
    executable, include, nanobind, jaxlib = probe.stdout.strip().split("\n")
    ctx.symlink(include, "python")
    ctx.symlink(nanobind, "nanobind")
    ctx.symlink(jaxlib, "jaxlib")
    ctx.file("BUILD.bazel", _BUILD.replace("{python}", executable))

local_python = repository_rule(
    _local_python_impl,
    environ = ["PATH", "PYTHON_BIN_PATH"],
    local = True,
)
