// The discounted scan of packed sequences on its own, in both directions: future KL, returns, advantage estimates.
//
// The forward scan is the reverse scan of the mirrored tokens: tiles are counted from the other end and a lane's vector
// is turned round. What the reverse scan calls a sequence's end is then its first token.
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/look_ahead.cuh"
#include "cuda/sequences.cuh"
#include "cuda/tile.cuh"
#include "cuda/token_streams.cuh"

namespace megatron_fipo::cuda {
namespace {

struct ScanLaunch {
  ScanArguments in;
  GammaPowers gamma;
  Workspace workspace;
  int64_t tiles;
};

struct ScanShared {
  SequenceEnds sequences;
  WarpTotals warps;
  float carry;
  Claim claim;
};

// start: the first token of the tile in memory order. By the whole block; then a barrier is needed.
template <bool kReverse>
__device__ __forceinline__ void mark_sequences(const ScanArguments& in, int64_t start, SequenceEnds& shared) {
  const PackedSequences& sequences = in.sequences;
  // forward, the tokens behind the last sequence count as one more: nothing may flow into them
  const int64_t count = kReverse ? sequences.count : sequences.count + 1;
  const int64_t first =
      kReverse ? first_beyond(sequences, 1, count, start) : first_beyond(sequences, 0, count, start - 1);
  for (int64_t s = first + threadIdx.x; s < count; s += kThreads) {
    const bool real = s < sequences.count;
    const int64_t begin = offset_of(sequences, s), end = real ? offset_of(sequences, s + 1) : in.num_tokens;
    const int64_t last = kReverse ? end - 1 : begin;   // in scan order: where the carry enters
    if (last >= start + kTile) break;
    if (begin >= end) continue;
    const int token = static_cast<int>(kReverse ? last - start : kTile - 1 - (last - start));
    mark_end(shared, token);
    shared.carry[token] = real && in.carry ? static_cast<float>(in.carry[s]) : 0.0f;
  }
}

template <bool kReverse, bool kAligned>
__global__ void __launch_bounds__(kThreads, 8) scan_kernel(MEGATRON_FIPO_PARAMETER ScanLaunch launch) {
  MEGATRON_FIPO_SHARED(ScanShared, shared);
  const ScanArguments& in = launch.in;
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  if (tid == 0) shared.claim = claim_tile(launch.workspace, launch.tiles);
  if (tid < kEndWords) shared.sequences.ends[tid] = 0;
  __syncthreads();
  const Claim claim = shared.claim;
  const int64_t start = (kReverse ? claim.tile : launch.tiles - 1 - claim.tile) * kTile;
  const int offset = warp * kWarpTokens + lane * kVector;   // in scan order
  const auto at = [&](int row) {                            // in memory order
    const int q = offset + row * kRowTokens;
    return start + (kReverse ? q : kTile - kVector - q);
  };
  const auto valid = [&](int row) {
    const int64_t rest = in.num_tokens - at(row);
    return static_cast<int>(rest < 0 ? 0 : rest < kVector ? rest : kVector);
  };

  float x[kRows][kVector];   // in memory order
  if (start + kTile <= in.num_tokens) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) load_tokens<kAligned>(in.x + at(row), x[row]);
  } else {
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      load_some_tokens<kAligned>(in.x + at(row), valid(row), &shared.sequences.carry[kVector * tid], x[row]);
    __syncthreads();   // the slots become carries
  }
  mark_sequences<kReverse>(in, start, shared.sequences);
  const int64_t used = offset_of(in.sequences, in.sequences.count);
  __syncthreads();

  unsigned ends[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    ends[row] = ends_of_vector(shared.sequences, offset + row * kRowTokens);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (at(row) + i >= used) x[row][i] = 0.0f;
  }
  const auto term = [&](int row, int i) { return x[row][kReverse ? i : kVector - 1 - i]; };
  const WarpScan scan = scan_warp(ends, shared.sequences.carry, offset, term, launch.gamma);
  if (lane == 0) {
    shared.warps.total[warp] = scan.total;
    shared.warps.has_end[warp] = scan.has_end;
  }
  __syncthreads();
  if (warp == 0) {
    const bool closed = last_token_ends(shared.sequences);
    const float carry = exchange_carries(launch.workspace, claim, launch.tiles, shared.warps, closed, launch.gamma);
    if (lane == 0) shared.carry = carry;
  }
  __syncthreads();

  float carry = carry_across_warps(shared.warps, warp + 1, shared.carry, launch.gamma);
  const float lane_power = power_below_32(launch.gamma.vectors, 31 - lane);
#pragma unroll
  for (int row = kRows - 1; row >= 0; --row) {
    float scanned[kVector], y[kVector];
    finish_row(scan, row, ends[row], shared.sequences.carry + offset + row * kRowTokens, carry, lane_power,
               [&](int, int i) { return term(row, i); }, launch.gamma, scanned);
    carry = next_row(scan, row, carry, launch.gamma);
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = scanned[kReverse ? i : kVector - 1 - i];
    store_tokens<kAligned>(in.y + at(row), valid(row), y);
  }
  finish_block(launch.workspace, claim.epoch, launch.tiles);
}

struct DoubleScanLaunch {
  const double* x;
  double* y;
  const double* carry;
  int64_t num_tokens;
  PackedSequences sequences;
  double gamma;
  bool reverse;
};

// fp64 serves gradient checks and oracles: one thread per sequence, and one for the tokens behind the last.
__global__ void double_scan_kernel(MEGATRON_FIPO_PARAMETER DoubleScanLaunch launch) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (s > launch.sequences.count) return;
  const int64_t begin = offset_of(launch.sequences, s);
  if (s == launch.sequences.count) {
    for (int64_t t = begin; t < launch.num_tokens; ++t) launch.y[t] = 0.0;
    return;
  }
  const int64_t size = offset_of(launch.sequences, s + 1) - begin;
  double value = launch.carry ? launch.carry[s] : 0.0;
  for (int64_t done = 0; done < size; ++done) {
    const int64_t t = begin + (launch.reverse ? size - 1 - done : done);
    launch.y[t] = value = launch.x[t] + launch.gamma * value;
  }
}

}  // namespace

int discounted_scan(const ScanArguments& arguments, double gamma, bool reverse, const WorkspaceMemory& workspace,
                    void* stream) {
  const ScanLaunch launch = {arguments, gamma_powers(gamma), workspace_of(workspace), tiles_of(arguments.num_tokens)};
  const bool aligned = aligned_to(arguments.x, 16) && aligned_to(arguments.y, 16);
  const auto run = [&](auto kernel) { MEGATRON_FIPO_LAUNCH(kernel, launch.tiles, kThreads, stream, launch); };
  if (reverse)
    aligned ? run(scan_kernel<true, true>) : run(scan_kernel<true, false>);
  else
    aligned ? run(scan_kernel<false, true>) : run(scan_kernel<false, false>);
  return static_cast<int>(cudaGetLastError());
}

int discounted_scan(const double* x, double* y, const double* carry, int64_t num_tokens,
                    const PackedSequences& sequences, double gamma, bool reverse, void* stream) {
  const DoubleScanLaunch launch = {x, y, carry, num_tokens, sequences, gamma, reverse};
  MEGATRON_FIPO_LAUNCH(double_scan_kernel, sequences.count / kThreads + 1, kThreads, stream, launch);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace megatron_fipo::cuda
