// Loss and counts of every sequence, in an order that does not depend on timing.
//
// A sequence that lies inside one tile is summed and written there. One that spans tiles leaves a part in each, and the
// tile that arrives last adds the parts from left to right. A tile holds at most two such pieces: its head, which began
// in an earlier tile, and its tail, which goes on in the next one (both, when it holds nothing else).
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/look_ahead.cuh"
#include "cuda/sequences.cuh"
#include "cuda/statistics.cuh"

namespace megatron_fipo::cuda {

struct Sums {
  double loss;
  int tokens, beyond_c;
};
__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
  return {a.loss + b.loss, a.tokens + b.tokens, a.beyond_c + b.beyond_c};
}
__device__ __forceinline__ Sums shuffle_up(const Sums& v, int distance) {
  return {__shfl_up_sync(kAllLanes, v.loss, distance), __shfl_up_sync(kAllLanes, v.tokens, distance),
          __shfl_up_sync(kAllLanes, v.beyond_c, distance)};
}

// What the tile knows of its sequences, beside their ends.
struct SequenceMarks {
  int32_t sequence[kTile];   // at an end: which one
  int32_t head, tail;
  bool head_ends;            // a head is here, and it ends here
  bool tail_exists;
  Sums head_sums, tail_sums;
  bool warp_has_end[kWarps];
  Sums warp_open[kWarps];    // since the warp's last end
};

constexpr unsigned char kResponseFlag = 1, kBeyondFlag = 2;

// A tile with sequence ends inside. Thread k sums tokens [16 k, 16 k + 16), and a scan over threads joins the pieces.
// write(sequence, sums) takes those that began and ended here. By the whole block; then a barrier is needed.
template <bool kWithLoss, class Write>
__device__ __forceinline__ void sum_mixed_tile(const SequenceEnds& shared, SequenceMarks& marks, const float* loss,
                                               const unsigned char* flags, Write write) {
  constexpr int kTokens = kTile / kThreads;
  static_assert(kTokens == 16, "a thread reads half a word of ends");
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, begin = kTokens * threadIdx.x;
  const unsigned ends = (shared.ends[begin >> 5] >> (begin & 31)) & 0xffffu;
  const auto token = [&](int i) {
    return Sums{kWithLoss ? loss[begin + i] : 0.0, flags[begin + i] & kResponseFlag,
                (flags[begin + i] & kBeyondFlag) >> 1};
  };
  const auto finish = [&](int i, const Sums& sums) {
    const int32_t sequence = marks.sequence[begin + i];
    if (marks.head_ends && sequence == marks.head)
      marks.head_sums = sums;
    else
      write(sequence, sums);
  };

  Sums open = {0.0, 0, 0};   // since this thread's last end
  for (int i = ends ? 32 - __clz(ends) : 0; i < kTokens; ++i) open = open + token(i);
  bool has_end = ends != 0;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Sums left = shuffle_up(open, distance);
    const bool left_has_end = __shfl_up_sync(kAllLanes, static_cast<unsigned>(has_end), distance) != 0;
    if (lane >= distance && !has_end) {
      open = left + open;
      has_end = left_has_end;
    }
  }
  if (lane == 31) {
    marks.warp_open[warp] = open;
    marks.warp_has_end[warp] = has_end;
  }
  const Sums left = shuffle_up(open, 1);
  const bool left_has_end = __shfl_up_sync(kAllLanes, static_cast<unsigned>(has_end), 1) != 0;
  __syncthreads();

  Sums before = {0.0, 0, 0};   // of the sequence that this thread's first token continues
  for (int w = 0; w < warp; ++w) before = marks.warp_has_end[w] ? marks.warp_open[w] : before + marks.warp_open[w];
  if (threadIdx.x == kThreads - 1) marks.tail_sums = has_end ? open : before + open;
  if (lane > 0) before = left_has_end ? left : before + left;
  for (int i = 0; i < kTokens && ends >> i; ++i) {
    before = before + token(i);
    if ((ends >> i) & 1u) {
      finish(i, before);
      before = {0.0, 0, 0};
    }
  }
}

// By one warp: adds this tile's part of a sequence that spans tiles; write(sequence, sums) if it was the last part.
template <class Write>
__device__ __forceinline__ void add_part(const Workspace& workspace, const PackedSequences& sequences, int64_t tile,
                                         int32_t sequence, const Sums& sums, Write write) {
  const int lane = threadIdx.x & 31;
  const int64_t first = offset_of(sequences, sequence) / kTile, last = (offset_of(sequences, sequence + 1) - 1) / kTile;
  // a tile's head and tail have places of their own; a piece that is both lies in the head's
  const auto part_of = [&](int64_t t) { return workspace.sequence_parts + 4 * t + (t == first ? 2 : 0); };
  unsigned arrived = 0;
  if (lane == 0) {
    uint64_t* part = part_of(tile);
    store_relaxed(part, __double_as_longlong(sums.loss));
    store_relaxed(part + 1, static_cast<uint64_t>(sums.beyond_c) << 32 | static_cast<unsigned>(sums.tokens));
    __threadfence();
    arrived = atomicAdd(workspace.sequence_arrivals + first, 1u) + 1;
  }
  if (__shfl_sync(kAllLanes, arrived, 0) != static_cast<unsigned>(last - first + 1)) return;
  __threadfence();
  __syncwarp();
  Sums total = {0.0, 0, 0};
  for (int64_t t = first + lane; t <= last; t += 32) {
    const uint64_t counts = load_relaxed(part_of(t) + 1);
    total = total + Sums{__longlong_as_double(static_cast<long long>(load_relaxed(part_of(t)))),
                         static_cast<int>(counts & 0xffffffffu), static_cast<int>(counts >> 32)};
  }
  total = {warp_sum(total.loss), warp_sum(total.tokens), warp_sum(total.beyond_c)};
  if (lane == 0) {
    workspace.sequence_arrivals[first] = 0;
    write(sequence, total);
  }
}

}  // namespace megatron_fipo::cuda
