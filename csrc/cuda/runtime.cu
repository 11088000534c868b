// The little that the bindings need of the CUDA runtime, and the workspace's size.
#include "cuda/kernels.h"
#include "cuda/look_ahead.cuh"

namespace megatron_fipo::cuda {

size_t workspace_bytes(int64_t tokens) { return workspace_size(tokens); }

const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int zero(void* data, size_t bytes, void* stream) {
  return static_cast<int>(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

int capture_id(void* stream, uint64_t* id) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture);
  *id = status == cudaStreamCaptureStatusNone ? 0 : capture;
  return static_cast<int>(error);
}

}  // namespace megatron_fipo::cuda
