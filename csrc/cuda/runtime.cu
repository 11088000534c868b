// The little that the bindings need of the CUDA runtime, and the workspace's size.
#include "cuda/kernels.h"
#include "cuda/look_ahead.cuh"

namespace megatron_fipo::cuda {

size_t workspace_bytes(int64_t tokens) { return workspace_size(tokens); }

const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int zero(void* data, size_t bytes, void* stream) {
  return static_cast<int>(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

int is_capturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return static_cast<int>(error);
}

}  // namespace megatron_fipo::cuda
