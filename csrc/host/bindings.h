// What csrc/bindings/host.cpp puts into megatron_fipo._host.
#pragma once

#include <pybind11/pybind11.h>

namespace megatron_fipo {

void bind_packing(pybind11::module_& module);

}  // namespace megatron_fipo
