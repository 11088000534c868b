// Sums and extrema over all tokens, in an order that does not depend on timing: lanes, then warps, then a tree over
// tiles in which the last of 32 neighbours to arrive reduces them. The block that completes the root is the last of the
// launch.
#pragma once

#include <cstdint>

#include "core/statistics.h"
#include "cuda/device.h"
#include "cuda/look_ahead.cuh"
#include "cuda/token_loss.cuh"

namespace megatron_fipo::cuda {

struct SharedStatistics {
  double warp[kWarps][kNumStatistics];
  double loss[kWarps];
  double block[kNumStatistics];
  bool completes_node;
};

__device__ __forceinline__ double combine(int statistic, double a, double b) {
  if (statistic < sum::count) return a + b;
  return statistic < sum::count + extremum::count ? fmin(a, b) : fmax(a, b);
}
__device__ __forceinline__ double neutral(int statistic) {
  if (statistic < sum::count) return 0.0;
  return statistic < sum::count + extremum::count ? HUGE_VAL : -HUGE_VAL;
}

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kAllLanes, v, distance);
  return v;
}

// The lanes' tokens of this warp, into shared.warp and shared.loss.
__device__ __forceinline__ void reduce_warp(const TokenStatistics& mine, SharedStatistics& shared) {
  const int lane = threadIdx.x & 31;
  double* out = shared.warp[threadIdx.x >> 5];
  const double loss = warp_sum(mine.loss);
  const float log_ratio = warp_sum(mine.log_ratio), weight = warp_sum(mine.weight),
              raw_weight = warp_sum(mine.raw_weight);
  // bytes become halves of a word: 32 lanes of 16 tokens
  const auto even = [](unsigned bytes) { return __reduce_add_sync(kAllLanes, bytes & 0x00ff00ffu); };
  const auto odd = [](unsigned bytes) { return __reduce_add_sync(kAllLanes, (bytes >> 8) & 0x00ff00ffu); };
  const unsigned tokens_active = even(mine.tokens_clipped_active_dual),
                 clipped_dual = odd(mine.tokens_clipped_active_dual);
  const unsigned high_2 = even(mine.high_low_2_3), low_3 = odd(mine.high_low_2_3);
  const unsigned from_4 = even(mine.from_4_small), small = odd(mine.from_4_small);
  float minima[extremum::count], maxima[extremum::count];
#pragma unroll
  for (int i = 0; i < extremum::count; ++i) {
    minima[i] = mine.minima[i], maxima[i] = mine.maxima[i];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      minima[i] = fminf(minima[i], __shfl_xor_sync(kAllLanes, minima[i], distance));
      maxima[i] = fmaxf(maxima[i], __shfl_xor_sync(kAllLanes, maxima[i], distance));
    }
  }
  if (lane != 0) return;
  shared.loss[threadIdx.x >> 5] = loss;
  out[sum::tokens] = tokens_active & 0xffffu;
  out[sum::log_ratio] = log_ratio;
  out[sum::clipped] = clipped_dual & 0xffffu;
  out[sum::dual_clipped] = clipped_dual >> 16;
  out[sum::weight] = weight;
  out[sum::raw_weight] = raw_weight;
  out[sum::weight_at_high] = high_2 & 0xffffu;
  out[sum::weight_at_low] = low_3 & 0xffffu;
  out[sum::active] = tokens_active >> 16;
  out[sum::negative_2_3] = high_2 >> 16;
  out[sum::negative_3_4] = low_3 >> 16;
  out[sum::negative_4_c] = from_4 & 0xffffu;
  out[sum::positive_small] = small & 0xffffu;
#pragma unroll
  for (int i = 0; i < extremum::count; ++i) {
    out[sum::count + i] = minima[i];
    out[sum::count + extremum::count + i] = maxima[i];
  }
}

// By the whole block, after a barrier behind reduce_warp().
__device__ __forceinline__ void reduce_block(SharedStatistics& shared) {
  const int k = threadIdx.x;
  if (k >= kNumStatistics) return;
  double v = shared.warp[0][k];
  for (int w = 1; w < kWarps; ++w) v = combine(k, v, shared.warp[w][k]);
  shared.block[k] = v;
}

// By the whole block, after a barrier behind reduce_block(). True in the launch's last block, with the total in
// shared.block; all that the other blocks wrote before is then visible to it.
__device__ __forceinline__ bool climb_tree(const Workspace& workspace, int64_t tile, int64_t tiles,
                                           SharedStatistics& shared) {
  const int lane = threadIdx.x & 31;
  uint64_t* level = workspace.nodes;
  unsigned* arrivals = workspace.node_arrivals;
  int64_t node = tile;
  for (int64_t width = tiles; width > 1;) {
    if (threadIdx.x < kNumStatistics)
      store_relaxed(level + node * kNumStatistics + threadIdx.x, __double_as_longlong(shared.block[threadIdx.x]));
    __threadfence();
    __syncthreads();
    const int64_t parent = node / kFanIn, rest = width - parent * kFanIn;
    const int children = static_cast<int>(rest < kFanIn ? rest : kFanIn);
    if (threadIdx.x == 0) {
      shared.completes_node = atomicAdd(arrivals + parent, 1u) == static_cast<unsigned>(children - 1);
      if (shared.completes_node) arrivals[parent] = 0;
    }
    __syncthreads();
    if (!shared.completes_node) return false;
    __threadfence();
    const uint64_t* child = level + (parent * kFanIn + lane) * kNumStatistics;
    for (int k = threadIdx.x >> 5; k < kNumStatistics; k += kWarps) {
      double v = lane < children ? __longlong_as_double(static_cast<long long>(load_relaxed(child + k))) : neutral(k);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) v = combine(k, v, __shfl_xor_sync(kAllLanes, v, distance));
      if (lane == 0) shared.block[k] = v;
    }
    __syncthreads();
    level += width * kNumStatistics;
    node = parent;
    width = (width + kFanIn - 1) / kFanIn;
    arrivals += width;
  }
  return true;
}

}  // namespace megatron_fipo::cuda
