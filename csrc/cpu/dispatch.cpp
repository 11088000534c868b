#include "cpu/capability.h"
#include "cpu/kernels.h"

namespace megatron_fipo {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (selected_cpu_capability()) {
      default: return kPortableKernels;
    }
  }();
  return chosen;
}

}  // namespace megatron_fipo
