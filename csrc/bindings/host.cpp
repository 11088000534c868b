// Host code for Python (megatron_fipo._host): what was built, what this CPU runs, packing. No torch.
#include <pybind11/pybind11.h>

#include <string>

#include "core/statistics.h"
#include "cpu/capability.h"
#include "host/bindings.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __VERSION__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = MEGATRON_FIPO_FLAGS;
  info["torch_target_version"] = MEGATRON_FIPO_TORCH_TARGET;
  py::list architectures;   // the list ends with 0, so that it is never empty
  for (int architecture : {MEGATRON_FIPO_CUDA_ARCHITECTURES})
    if (architecture) architectures.append("sm_" + std::to_string(architecture));
  info["cuda"] = py::tuple(architectures);
  return info;
}

py::dict cpu_capability() {
  using namespace megatron_fipo;
  py::list built;
  for (CpuCapability capability : built_cpu_capabilities()) built.append(name(capability));
  py::dict info;
  info["offered"] = name(offered_cpu_capability());
  info["built"] = built;
  info["selected"] = name(selected_cpu_capability());
  return info;
}

template <size_t N>
py::tuple names(const char* const (&list)[N]) {
  py::tuple result(N);
  for (size_t i = 0; i < N; ++i) result[i] = py::str(list[i]);
  return result;
}

py::dict loss_statistics() {
  py::dict layout;
  layout["sums"] = names(megatron_fipo::kSumNames);
  layout["extrema"] = names(megatron_fipo::kExtremumNames);
  return layout;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  megatron_fipo::bind_packing(module);
  module.def("build_info", &build_info,
             "{'compiler', 'flags', 'torch_target_version': the oldest torch the operators load on, "
             "'cuda': architectures with kernels, such as 'sm_90'; empty: none}");
  module.def("loss_statistics", &loss_statistics,
             "{'sums', 'extrema': names}: the operators' statistics_K holds the sums, the minima, then the maxima.");
  module.def("cpu_capability", &cpu_capability,
             "{'offered': by this CPU, 'built': in this build, 'selected': in use}; MEGATRON_FIPO_CPU overrides. "
             "Raises RuntimeError when that variable names kernels that cannot run here.");
}
