// The kernels for AVX2 and FMA. The standard headers come before the pragma, so that nothing shared is compiled for it.
#include "cpu/capability.h"
#ifdef MEGATRON_FIPO_X86
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/kernels.h"

#pragma GCC target("avx2,fma")
#define MEGATRON_FIPO_EXP_TABLE 1
#define MEGATRON_FIPO_KERNELS kAvx2Kernels
#include "cpu/simd_avx2.h"
// clang-format off: the header above comes first
#include "cpu/kernels.inc"
#endif
