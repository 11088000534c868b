// Reading and writing a lane's 4 neighbouring tokens.
//
// Aligned streams move in 128-bit accesses (64-bit for bf16, 32-bit for the mask); the vector that crosses the last
// token goes through an asynchronous copy, which stops at a byte count. When any stream of a launch starts off its
// vector boundary (a slice of a tensor), kAligned is false and everything moves token by token.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/tile.cuh"

namespace megatron_fipo::cuda {

typedef uint16_t Bf16;   // its bits

template <class T>
struct Vector4;
template <>
struct Vector4<float> {
  using type = float4;
};
template <>
struct Vector4<Bf16> {
  using type = uint2;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

__device__ __forceinline__ void unpack(const float4& v, float (&out)[kVector]) {
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}
__device__ __forceinline__ void unpack(const uint2& v, float (&out)[kVector]) {
  out[0] = __uint_as_float(v.x << 16), out[1] = __uint_as_float(v.x & 0xffff0000u);
  out[2] = __uint_as_float(v.y << 16), out[3] = __uint_as_float(v.y & 0xffff0000u);
}

// valid: how many of the 4 tokens exist. The others read 0. slot: 16 aligned bytes of shared memory of this lane's own.
template <bool kAligned, class T>
__device__ __forceinline__ void load_some_tokens(const T* tokens, int valid, void* slot, float (&out)[kVector]) {
  if (kAligned) {
    using Vector = typename Vector4<T>::type;
    Vector vector = {};
    if (valid > 0) {
      async_copy<sizeof(Vector)>(slot, tokens, valid * static_cast<int>(sizeof(T)));
      async_wait();
      vector = *static_cast<const Vector*>(slot);
    }
    unpack(vector, out);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] = i < valid ? to_float(tokens[i]) : 0.0f;
  }
}
template <bool kAligned, class T>
__device__ __forceinline__ void load_tokens(const T* tokens, float (&out)[kVector]) {
  if (kAligned)
    unpack(load_stream(reinterpret_cast<const typename Vector4<T>::type*>(tokens)), out);
  else
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] = to_float(tokens[i]);
}

// The 4 bools as the 4 bytes of a word.
template <bool kAligned>
__device__ __forceinline__ unsigned load_mask(const uint8_t* tokens, int valid) {
  if (kAligned && valid >= kVector) return load_stream(reinterpret_cast<const unsigned*>(tokens));
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (i < valid && tokens[i]) mask |= 1u << (8 * i);
  return mask;
}

// Starts a copy into shared memory; after async_wait() the copying lane sees it.
template <bool kAligned>
__device__ __forceinline__ void prefetch_tokens(float* shared, const float* tokens, int valid) {
  if (kAligned) {
    if (valid > 0) async_copy<16>(shared, tokens, 4 * (valid < kVector ? valid : kVector));
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < valid) async_copy<4>(shared + i, tokens + i, 4);
  }
}

template <bool kAligned>
__device__ __forceinline__ void store_tokens(float* tokens, int valid, const float (&v)[kVector]) {
  if (kAligned && valid >= kVector)
    store_vector(reinterpret_cast<float4*>(tokens), make_float4(v[0], v[1], v[2], v[3]));
  else
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < valid) tokens[i] = v[i];
}

inline bool aligned_to(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace megatron_fipo::cuda
