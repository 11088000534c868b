#include "cpu/capability.h"
#include "cpu/kernels.h"

namespace megatron_fipo {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (selected_cpu_capability()) {
#ifdef MEGATRON_FIPO_X86
      case CpuCapability::avx512: return kAvx512Kernels;
      case CpuCapability::avx2: return kAvx2Kernels;
#endif
      default: return kPortableKernels;
    }
  }();
  return chosen;
}

}  // namespace megatron_fipo
