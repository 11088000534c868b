// The scan inside one tile of tokens: y[q] = x[q] + gamma * y[q + 1], restarting at every sequence end.
//
// A block of 4 warps owns a tile of 2048 consecutive tokens, a warp 512 of them as 4 rows of 128, a lane 4 neighbours
// of each row, so that every load and store of a row is one coalesced 128-bit access per lane. Nothing is transposed: a
// lane scans its 4 tokens, a row is combined by 5 shuffles, rows and warps by a few multiplications with powers of
// gamma.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device.h"

namespace megatron_fipo::cuda {

constexpr int kWarps = 4, kRows = 4, kVector = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRowTokens = 32 * kVector;
constexpr int kWarpTokens = kRows * kRowTokens;
constexpr int kTile = kWarps * kWarpTokens;
constexpr int kEndWords = kTile / 32;   // of the bit set that marks sequence ends
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kEndWords == 64, "next_end() keeps one bit per word in 64 bits");

// gamma to the distances that the scan steps over, each taken in double and rounded once.
struct GammaPowers {
  float token;
  float vectors[5];   // 1, 2, 4, 8, 16 lanes
  float row, warp;
  float tiles[6];     // 1, 2, 4, 8, 16, 32 tiles
};

inline GammaPowers gamma_powers(double gamma) {
  const auto power = [gamma](int64_t tokens) {
    return static_cast<float>(std::pow(gamma, static_cast<double>(tokens)));
  };
  GammaPowers g;
  g.token = power(1);
  for (int k = 0; k < 5; ++k) g.vectors[k] = power(static_cast<int64_t>(kVector) << k);
  g.row = power(kRowTokens);
  g.warp = power(kWarpTokens);
  for (int k = 0; k < 6; ++k) g.tiles[k] = power(static_cast<int64_t>(kTile) << k);
  return g;
}

// base^exponent from the powers of base to 1, 2, 4, 8, 16.
__device__ __forceinline__ float power_below_32(const float* powers, int exponent) {
  float result = 1.0f;
#pragma unroll
  for (int k = 0; k < 5; ++k)
    if (exponent & (1 << k)) result *= powers[k];
  return result;
}

// What the tile's blocks share: where sequences end, and what stands behind each end.
struct SequenceEnds {
  unsigned ends[kEndWords];   // bit q: token q is the last of its sequence
  alignas(16) float carry[kTile];   // at such a token: the scan value behind it
};

// A warp's rows, scanned with nothing to their right. "Total" is the scan value at the first token.
struct WarpScan {
  float from_right[kRows];      // total of the lanes to the right, up to the row's end
  float row_total[kRows];
  unsigned end_lanes[kRows];    // lanes that hold a sequence end
  float total;
  bool has_end;
};

// x(row, i): this lane's tokens. offset: the tile offset of its first one. ends[row]: 4 bits.
template <class X>
__device__ __forceinline__ WarpScan scan_warp(const unsigned (&ends)[kRows], const float* carry, int offset, X x,
                                              const GammaPowers& gamma) {
  const int lane = threadIdx.x & 31;
  WarpScan scan;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    scan.end_lanes[row] = __ballot_sync(kAllLanes, ends[row] != 0);
    float y = 0.0f;
    if (scan.end_lanes[row] == 0) {
#pragma unroll
      for (int i = kVector - 1; i >= 0; --i) y = fmaf(gamma.token, y, x(row, i));
    } else {
#pragma unroll
      for (int i = kVector - 1; i >= 0; --i)
        y = fmaf(gamma.token, (ends[row] >> i) & 1u ? carry[offset + row * kRowTokens + i] : y, x(row, i));
    }
    scan.row_total[row] = y;
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    // combine with lanes to the right, but not beyond the first one that holds an end
    const unsigned ends_from_here = scan.end_lanes[row] >> lane;
    const int open = ends_from_here ? __ffs(ends_from_here) - 1 : 32;
    const int reach = open < 31 - lane ? open : 31 - lane;
    float y = scan.row_total[row];
#pragma unroll
    for (int k = 0; k < 5; ++k) {
      const float right = __shfl_down_sync(kAllLanes, y, 1 << k);
      if ((1 << k) <= reach) y = fmaf(gamma.vectors[k], right, y);
    }
    const float right = __shfl_down_sync(kAllLanes, y, 1);
    scan.from_right[row] = lane == 31 ? 0.0f : right;
    scan.row_total[row] = __shfl_sync(kAllLanes, y, 0);
  }
  scan.total = 0.0f;
  scan.has_end = false;
#pragma unroll
  for (int row = kRows - 1; row >= 0; --row) {
    scan.total = scan.end_lanes[row] ? scan.row_total[row] : fmaf(gamma.row, scan.total, scan.row_total[row]);
    scan.has_end |= scan.end_lanes[row] != 0;
  }
  return scan;
}

// What each warp tells the others.
struct WarpTotals {
  float total[kWarps];
  bool has_end[kWarps];
};

// The scan value at the first token of warp `first`, when `carry` stands behind the tile.
__device__ __forceinline__ float carry_across_warps(const WarpTotals& warps, int first, float carry,
                                                    const GammaPowers& gamma) {
#pragma unroll
  for (int w = kWarps - 1; w >= 0; --w)
    if (w >= first) carry = warps.has_end[w] ? warps.total[w] : fmaf(gamma.warp, carry, warps.total[w]);
  return carry;
}

// The finished scan of a lane's 4 tokens in one row; `carry` is the value just right of the row. Afterwards call
// next_row().
template <class X>
__device__ __forceinline__ void finish_row(const WarpScan& scan, int row, unsigned ends, const float* carries,
                                           float carry, float lane_power, X x, const GammaPowers& gamma,
                                           float (&y)[kVector]) {
  const int lane = threadIdx.x & 31;
  const bool open = ((scan.end_lanes[row] >> lane) >> 1) == 0;   // no end in the lanes to the right
  float value = open ? fmaf(lane_power, carry, scan.from_right[row]) : scan.from_right[row];
  if (scan.end_lanes[row] == 0) {
#pragma unroll
    for (int i = kVector - 1; i >= 0; --i) y[i] = value = fmaf(gamma.token, value, x(row, i));
  } else {
#pragma unroll
    for (int i = kVector - 1; i >= 0; --i)
      y[i] = value = fmaf(gamma.token, (ends >> i) & 1u ? carries[i] : value, x(row, i));
  }
}
__device__ __forceinline__ float next_row(const WarpScan& scan, int row, float carry, const GammaPowers& gamma) {
  return scan.end_lanes[row] ? scan.row_total[row] : fmaf(gamma.row, carry, scan.row_total[row]);
}

}  // namespace megatron_fipo::cuda
