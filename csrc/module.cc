// The Python module deepgemm_jax._C: XLA's entry points to the kernels, and the kernel cache.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <string>

#include "attention/handler.h"
#include "device/types.h"
#include "gemm/handler.h"
#include "jit/compile.h"
#include "jit/cuda.h"
#include "jit/sources.h"
#include "layout/handler.h"
#include "quantize/handler.h"
#include "training/handler.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;
using namespace deepgemm;

namespace {

// What jax.ffi.register_ffi_target takes: a stage of XLA's has a function each.
nb::dict stages(XLA_FFI_Handler* instantiate, XLA_FFI_Handler* initialize,
                XLA_FFI_Handler* execute) {
  nb::dict dict;
  dict["instantiate"] = nb::capsule(reinterpret_cast<void*>(instantiate));
  dict["initialize"] = nb::capsule(reinterpret_cast<void*>(initialize));
  dict["execute"] = nb::capsule(reinterpret_cast<void*>(execute));
  return dict;
}

// What jax.ffi.register_ffi_type takes. XLA writes the id that it gives to the type into it.
template <class State>
nb::dict type() {
  static xla::ffi::TypeInfo info = xla::ffi::MakeTypeInfo<State>();
  nb::dict dict;
  dict["type_id"] = nb::capsule(static_cast<void*>(&State::id));
  dict["type_info"] = nb::capsule(static_cast<void*>(&info));
  return dict;
}

}  // namespace

NB_MODULE(_C, m) {
  using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

  m.def("registrations", [] {
    nb::dict targets;
    targets["deepgemm_jax_gemm"] = stages(GemmInstantiate, GemmInitialize, GemmExecute);
    targets["deepgemm_jax_mqa_logits"] = stages(LogitsInstantiate, LogitsInitialize, LogitsExecute);
    targets["deepgemm_jax_paged_mqa_logits"] =
        stages(LogitsInstantiate, LogitsInitialize, PagedLogitsExecute);
    targets["deepgemm_jax_topk"] = stages(TopkInstantiate, TopkInitialize, TopkExecute);
    targets["deepgemm_jax_quantize_rows"] =
        stages(QuantizeRowsInstantiate, QuantizeRowsInitialize, QuantizeRowsExecute);
    targets["deepgemm_jax_quantize_tiles"] =
        stages(QuantizeTilesInstantiate, QuantizeTilesInitialize, QuantizeTilesExecute);
    targets["deepgemm_jax_transpose"] =
        stages(TransposeInstantiate, TransposeInitialize, TransposeExecute);
    targets["deepgemm_jax_swiglu_forward"] =
        stages(SwigluForwardInstantiate, SwigluForwardInitialize, SwigluForwardExecute);
    targets["deepgemm_jax_swiglu_backward"] =
        stages(SwigluBackwardInstantiate, SwigluBackwardInitialize, SwigluBackwardExecute);
    return targets;
  });
  m.def("types", [] {
    nb::dict types;
    types["deepgemm_jax_gemm_state"] = type<GemmState>();
    types["deepgemm_jax_logits_state"] = type<LogitsState>();
    types["deepgemm_jax_topk_state"] = type<TopkState>();
    types["deepgemm_jax_quantize_rows_state"] = type<quantize::RowsState>();
    types["deepgemm_jax_quantize_tiles_state"] = type<quantize::TilesState>();
    types["deepgemm_jax_transpose_state"] = type<layout::State>();
    types["deepgemm_jax_swiglu_forward_state"] = type<training::State<training::SwigluForward>>();
    types["deepgemm_jax_swiglu_backward_state"] = type<training::State<training::SwigluBackward>>();
    return types;
  });
  m.def("gemm_smem_bytes", gemm_smem_bytes, nb::arg("source"), nb::arg("config"));
  m.def("logits_smem_bytes", logits_smem_bytes, nb::arg("config"));

  nb::class_<jit::Compilation>(m, "Compilation")
      .def_prop_ro(
          "cubin",
          [](const jit::Compilation& c) { return nb::bytes(c.cubin.data(), c.cubin.size()); })
      .def_ro("log", &jit::Compilation::log)
      .def_ro("cached", &jit::Compilation::cached)
      .def_ro("seconds", &jit::Compilation::seconds);
  m.def(
      "configure",
      [](std::string cache_dir, std::vector<std::string> nvrtc) {
        jit::configure({std::move(cache_dir), std::move(nvrtc)});
      },
      nb::arg("cache_dir"), nb::arg("nvrtc"));
  m.def(
      "compile",
      [](std::string source, std::vector<int> config, std::string arch) {
        return jit::compile({std::move(source), std::move(config), std::move(arch)});
      },
      nb::arg("source"), nb::arg("config"), nb::arg("arch"), WithoutGil());
  m.def("nvrtc_version", [] { return jit::nvrtc_version(); }, WithoutGil());
  m.def("driver_version", jit::driver_version);
  m.def("memory_gbs", jit::memory_gbs, nb::arg("device"));
  m.def("l2_may_hold", l2_may_hold, nb::arg("bytes"));
  m.def("statistics", [] {
    return std::map<std::string, int64_t>{{"compiled", jit::statistics.compiled},
                                          {"disk_hits", jit::statistics.disk_hits},
                                          {"memory_hits", jit::statistics.memory_hits}};
  });
  m.def("device_sources", [] {
    return std::map<std::string, std::string>(jit::device_sources().begin(),
                                              jit::device_sources().end());
  });
}
