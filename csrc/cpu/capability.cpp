#include "cpu/capability.h"

#include <cstdlib>
#include <stdexcept>

namespace megatron_fipo {

const char* name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::avx512: return "avx512";
    case CpuCapability::avx2: return "avx2";
    default: return "portable";
  }
}

CpuCapability offered_cpu_capability() {
#ifdef MEGATRON_FIPO_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return CpuCapability::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuCapability::avx2;
#endif
  return CpuCapability::portable;
}

std::vector<CpuCapability> built_cpu_capabilities() {
#ifdef MEGATRON_FIPO_X86
  return {CpuCapability::portable, CpuCapability::avx2, CpuCapability::avx512};
#else
  return {CpuCapability::portable};
#endif
}

CpuCapability selected_cpu_capability() {
  const CpuCapability offered = offered_cpu_capability();
  const char* wanted = std::getenv("MEGATRON_FIPO_CPU");
  CpuCapability best = CpuCapability::portable;
  std::string usable;
  for (CpuCapability built : built_cpu_capabilities()) {
    if (built > offered) continue;
    if (wanted && std::string(wanted) == name(built)) return built;
    best = built;
    usable += (usable.empty() ? "" : ", ") + std::string(name(built));
  }
  if (wanted && *wanted)
    throw std::runtime_error("MEGATRON_FIPO_CPU=" + std::string(wanted) + " cannot be used here: set it to one of: " + usable);
  return best;
}

}  // namespace megatron_fipo
