// The kernels for the compiler's baseline instruction set (SSE2 on x86-64, NEON on aarch64).
#define MEGATRON_FIPO_LANES 4
#define MEGATRON_FIPO_KERNELS kPortableKernels
#include "cpu/kernels.inc"
