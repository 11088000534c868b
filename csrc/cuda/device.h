// What the kernels ask of the device beyond plain CUDA C++. The kernel sources compile twice: with nvcc for GPUs, and
// with g++ against the tests' emulator, which runs every CUDA thread on the CPU and brings its own version of all this.
#pragma once

#include <cstdint>

#if defined(MEGATRON_FIPO_EMULATOR)

#include "cuda_emulator.h"

#else

#include <cuda_runtime.h>

#define MEGATRON_FIPO_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define MEGATRON_FIPO_PARAMETER const __grid_constant__
#define MEGATRON_FIPO_SHARED(type, name) __shared__ type name

namespace megatron_fipo::cuda {

// Token streams are read once, so they do not displace anything from the first-level cache.
__device__ __forceinline__ float4 load_stream(const float4* p) {
  float4 v;
  asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_stream(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ unsigned load_stream(const unsigned* p) {
  unsigned v;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ void store_vector(float4* p, float4 v) { *p = v; }

// Copies `valid` of kBytes (4, 8 or 16) bytes into shared memory and fills the rest with zeros, without waiting.
// The copying thread sees the result after async_wait().
template <int kBytes>
__device__ __forceinline__ void async_copy(void* shared, const void* global, int valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 64-bit words that other blocks read while this kernel runs: never torn, never from a stale first-level cache.
__device__ __forceinline__ void store_relaxed(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

// Unlike fminf and fmaxf, a NaN on either side passes through.
__device__ __forceinline__ float min_nan(float a, float b) {
  float v;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

}  // namespace megatron_fipo::cuda

#endif
