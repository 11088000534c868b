// The kernels for the compiler's baseline instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/kernels.h"

#define MEGATRON_FIPO_KERNELS kPortableKernels
#include "cpu/simd_portable.h"
// clang-format off: the header above comes first
#include "cpu/kernels.inc"
