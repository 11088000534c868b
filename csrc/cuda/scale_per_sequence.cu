// The loss's backward pass: every token's stored gradient times what its sequence's loss received.
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/sequences.cuh"
#include "cuda/tile.cuh"
#include "cuda/token_streams.cuh"

namespace megatron_fipo::cuda {
namespace {

struct ScaleLaunch {
  const float* x;
  const double* scale;
  float* y;
  int64_t num_tokens;
  PackedSequences sequences;
};

// The sequence that holds a token, or the number of sequences; by one lane, from `low` on.
__device__ __forceinline__ int64_t sequence_of(const PackedSequences& sequences, int64_t low, int64_t token) {
  int64_t high = sequences.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offset_of(sequences, middle + 1) > token)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// A warp takes its share of a tile; most warps meet one sequence only.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads) scale_kernel(MEGATRON_FIPO_PARAMETER ScaleLaunch launch) {
  const PackedSequences& sequences = launch.sequences;
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5)) * kWarpTokens;
  if (start >= launch.num_tokens) return;
  int64_t sequence = first_beyond(sequences, 1, sequences.count, start), end;
  float scale;
  const auto enter = [&](int64_t s) {
    sequence = s;
    end = s < sequences.count ? offset_of(sequences, s + 1) : launch.num_tokens;
    scale = s < sequences.count ? static_cast<float>(launch.scale[s]) : 0.0f;
  };
  enter(sequence);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int64_t t = start + row * kRowTokens + (threadIdx.x & 31) * kVector, rest = launch.num_tokens - t;
    if (rest <= 0) return;
    float v[kVector];
    if (rest >= kVector)
      load_tokens<kAligned>(launch.x + t, v);
    else
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = i < rest ? launch.x[t + i] : 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (t + i >= end && i < rest) enter(sequence_of(sequences, sequence, t + i));
      v[i] = sequence < sequences.count ? v[i] * scale : 0.0f;
    }
    store_tokens<kAligned>(launch.y + t, static_cast<int>(rest < kVector ? rest : kVector), v);
  }
}

}  // namespace

int scale_per_sequence(const float* x, const double* scale, float* y, int64_t num_tokens,
                       const PackedSequences& sequences, void* stream) {
  if (num_tokens == 0) return 0;
  const ScaleLaunch launch = {x, scale, y, num_tokens, sequences};
  const auto run = [&](auto kernel) {
    MEGATRON_FIPO_LAUNCH(kernel, (num_tokens + kTile - 1) / kTile, kThreads, stream, launch);
  };
  aligned_to(x, 16) && aligned_to(y, 16) ? run(scale_kernel<true>) : run(scale_kernel<false>);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace megatron_fipo::cuda
