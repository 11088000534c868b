// Which sequences a tile holds, from cu_seqlens alone.
#pragma once

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/tile.cuh"

namespace megatron_fipo::cuda {

__device__ __forceinline__ int64_t offset_of(const PackedSequences& sequences, int64_t i) {
  return sequences.wide ? static_cast<const int64_t*>(sequences.offsets)[i]
                        : static_cast<const int32_t*>(sequences.offsets)[i];
}

// The smallest i in [0, count] with offset(first + i) > token, count if there is none; by a whole warp, 32 probes at a
// time.
__device__ __forceinline__ int64_t first_beyond(const PackedSequences& sequences, int64_t first, int64_t count,
                                                int64_t token) {
  const int lane = threadIdx.x & 31;
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t step = (high - low + 31) / 32, probe = low + step * (lane + 1) - 1;
    const bool before = probe < high && offset_of(sequences, first + probe) <= token;
    const int passed = __popc(__ballot_sync(kAllLanes, before));
    const int64_t bound = low + step * (passed + 1) - 1;
    low += step * passed;
    high = bound < high ? bound : high;
  }
  return low;
}

__device__ __forceinline__ void mark_end(SequenceEnds& shared, int token) {
  atomicOr(&shared.ends[token >> 5], 1u << (token & 31));
}

__device__ __forceinline__ unsigned ends_of_vector(const SequenceEnds& shared, int token) {
  return (shared.ends[token >> 5] >> (token & 31)) & 15u;
}

__device__ __forceinline__ bool last_token_ends(const SequenceEnds& shared) { return shared.ends[kEndWords - 1] >> 31; }

// One bit per word of the set of ends, by a whole warp.
__device__ __forceinline__ uint64_t words_with_ends(const SequenceEnds& shared) {
  const int lane = threadIdx.x & 31;
  const unsigned low = __ballot_sync(kAllLanes, shared.ends[lane] != 0);
  const unsigned high = __ballot_sync(kAllLanes, shared.ends[32 + lane] != 0);
  return static_cast<uint64_t>(high) << 32 | low;
}

// The first token at or after `token` that ends a sequence; -1: none in this tile.
__device__ __forceinline__ int next_end(const SequenceEnds& shared, uint64_t words, int token) {
  int word = token >> 5;
  const unsigned here = shared.ends[word] >> (token & 31);
  if (here) return token + __ffs(here) - 1;
  const uint64_t later = word == 63 ? 0 : words >> (word + 1);
  if (later == 0) return -1;
  word += __ffsll(static_cast<long long>(later));
  return 32 * word + __ffs(shared.ends[word]) - 1;
}

}  // namespace megatron_fipo::cuda
