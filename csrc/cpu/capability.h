// Which instruction set the CPU offers and which kernels are used. Free of kernels, so that host code can ask.
#pragma once

#include <string>
#include <vector>

// The vector kernels of x86-64 are built by GCC, whose target pragma they need; other compilers and processors get the
// portable ones.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEGATRON_FIPO_X86 1
#endif

namespace megatron_fipo {

enum class CpuCapability { portable, avx2, avx512 };

const char* name(CpuCapability capability);

// The best instruction set of this machine.
CpuCapability offered_cpu_capability();

// The kernels in this build, in ascending order.
std::vector<CpuCapability> built_cpu_capabilities();

// The kernels in use: the environment variable MEGATRON_FIPO_CPU=portable|avx2|avx512, else the best that is both built
// and offered. Throws std::runtime_error when the variable names something else.
CpuCapability selected_cpu_capability();

}  // namespace megatron_fipo
