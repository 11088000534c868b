// The kernels for AVX-512 (F, BW, VL, DQ). The standard headers come before the pragma: nothing shared is compiled for it.
#include "cpu/capability.h"
#ifdef MEGATRON_FIPO_X86
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/kernels.h"

// GCC 12 gives both for its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt,bmi2")
#define MEGATRON_FIPO_EXP_TABLE 1
#define MEGATRON_FIPO_KERNELS kAvx512Kernels
#include "cpu/simd_avx512.h"
// clang-format off: the header above comes first
#include "cpu/kernels.inc"
#endif
