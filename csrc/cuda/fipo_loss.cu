// The FIPO loss of packed sequences, its gradient and its statistics, in one pass over the tokens; and the aggregates
// that context-parallel shards exchange before it. Read tile.cuh, then look_ahead.cuh, then this.
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/look_ahead.cuh"
#include "cuda/sequence_sums.cuh"
#include "cuda/sequences.cuh"
#include "cuda/statistics.cuh"
#include "cuda/tile.cuh"
#include "cuda/token_loss.cuh"
#include "cuda/token_streams.cuh"

namespace megatron_fipo::cuda {
namespace {

struct LossLaunch {
  LossArguments in;
  LossResults loss;            // of the fused pass
  AggregateResults aggregate;  // of the aggregate mode
  LossRules rules;
  GammaPowers gamma;
  Workspace workspace;
  int64_t tiles;
};

struct LossShared {
  SequenceEnds sequences;
  SequenceMarks marks;
  alignas(16) float advantage[kTile];   // per token, or per sequence at its end
  alignas(16) float value[kTile];       // token weight, then the token's loss; in the aggregate mode F
  alignas(16) unsigned flags[kTile / kVector];   // a byte per token
  SharedStatistics statistics;
  WarpTotals warps;
  int beyond_c[kWarps];
  float tail_advantage;
  float carry;
  Claim claim;
};

template <bool kAggregate>
__device__ __forceinline__ void write_sequence(const LossLaunch& launch, int64_t sequence, const Sums& sums) {
  if (kAggregate) {
    launch.aggregate.beyond_c[sequence] = sums.beyond_c;
  } else {
    launch.loss.loss[sequence] = sums.loss;
    launch.loss.counts[2 * sequence] = sums.tokens;
    launch.loss.counts[2 * sequence + 1] = sums.beyond_c;
  }
}

// Marks the ends in the tile that starts at token `start`, and whatever belongs to their sequences. Returns the first
// sequence that is looked at. By the whole block; then a barrier is needed.
template <bool kAggregate>
__device__ __forceinline__ int64_t mark_sequences(const LossLaunch& launch, int64_t start, LossShared& shared) {
  const PackedSequences& sequences = launch.in.sequences;
  // empty sequences at token 0 belong to the first tile, others to the tile of the token before them
  const int64_t first = start == 0 ? 0 : first_beyond(sequences, 1, sequences.count, start);
  for (int64_t s = first + threadIdx.x; s < sequences.count; s += kThreads) {
    const int64_t begin = offset_of(sequences, s), end = offset_of(sequences, s + 1);
    if (end > start + kTile) {
      if (s == first || begin <= start + kTile) {   // one thread at most
        shared.marks.tail = static_cast<int32_t>(s);
        shared.marks.tail_exists = begin < start + kTile;
        if (!launch.in.advantage_is_per_token) shared.tail_advantage = launch.in.advantage[s];
      }
      break;
    }
    if (begin == end) {
      write_sequence<kAggregate>(launch, s, {0.0, 0, 0});
      if (kAggregate) launch.aggregate.aggregate[s] = 0.0f;
      continue;
    }
    const int token = static_cast<int>(end - 1 - start);
    mark_end(shared.sequences, token);
    shared.sequences.carry[token] = launch.in.carry ? static_cast<float>(launch.in.carry[s]) : 0.0f;
    shared.marks.sequence[token] = static_cast<int32_t>(s);
    if (!launch.in.advantage_is_per_token) shared.advantage[token] = launch.in.advantage[s];
    if (s == first) {
      shared.marks.head = static_cast<int32_t>(s);
      shared.marks.head_ends = begin < start;
    }
  }
  return first;
}

// The pieces of sequences that go beyond this tile. By the whole block.
template <bool kAggregate>
__device__ __forceinline__ void add_parts(const LossLaunch& launch, int64_t tile, const SequenceMarks& marks) {
  const auto write = [&](int64_t sequence, const Sums& sums) { write_sequence<kAggregate>(launch, sequence, sums); };
  const int warp = threadIdx.x >> 5;
  if (warp == 0 && marks.head_ends)
    add_part(launch.workspace, launch.in.sequences, tile, marks.head, marks.head_sums, write);
  if (warp == 1 && marks.tail_exists)
    add_part(launch.workspace, launch.in.sequences, tile, marks.tail, marks.tail_sums, write);
}

template <class LogProb, bool kAligned, bool kAggregate>
__global__ void __launch_bounds__(kThreads, 4) fipo_kernel(MEGATRON_FIPO_PARAMETER LossLaunch launch) {
  MEGATRON_FIPO_SHARED(LossShared, shared);
  const LossArguments& in = launch.in;
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  if (tid == 0) {
    shared.claim = claim_tile(launch.workspace, launch.tiles);
    shared.marks.head_ends = shared.marks.tail_exists = false;
    shared.tail_advantage = 0.0f;
  }
  if (tid < kEndWords) shared.sequences.ends[tid] = 0;
  __syncthreads();
  const Claim claim = shared.claim;
  const int64_t start = claim.tile * kTile;
  const int offset = warp * kWarpTokens + lane * kVector;   // in the tile, of this lane's first token
  const auto valid = [&](int row) {
    const int64_t rest = in.num_tokens - start - offset - row * kRowTokens;
    return static_cast<int>(rest < 0 ? 0 : rest < kVector ? rest : kVector);
  };

  // all loads first
  float log_ratio[kRows][kVector];   // not yet clamped
  unsigned mask[kRows];              // a byte per token
  const bool whole = start + kTile <= in.num_tokens;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int q = offset + row * kRowTokens;
    if (in.token_weight && !kAggregate)
      prefetch_tokens<kAligned>(shared.value + q, in.token_weight + start + q, valid(row));
    if (in.advantage_is_per_token)
      prefetch_tokens<kAligned>(shared.advantage + q, in.advantage + start + q, valid(row));
  }
  const LogProb* logp = static_cast<const LogProb*>(in.logp) + start + offset;
  const LogProb* old_logp = static_cast<const LogProb*>(in.old_logp) + start + offset;
  float old[kRows][kVector];
  if (whole) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      load_tokens<kAligned>(logp + row * kRowTokens, log_ratio[row]);
      load_tokens<kAligned>(old_logp + row * kRowTokens, old[row]);
    }
  } else {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      void* slot = &shared.sequences.carry[kVector * tid];
      load_some_tokens<kAligned>(logp + row * kRowTokens, valid(row), slot, log_ratio[row]);
      load_some_tokens<kAligned>(old_logp + row * kRowTokens, valid(row), slot, old[row]);
    }
    __syncthreads();   // the slots become carries
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    mask[row] = load_mask<kAligned>(in.response_mask + start + offset + row * kRowTokens, valid(row));
#pragma unroll
    for (int i = 0; i < kVector; ++i) log_ratio[row][i] -= old[row][i];
  }

  const int64_t first_sequence = mark_sequences<kAggregate>(launch, start, shared);
  const int64_t used = offset_of(in.sequences, in.sequences.count) - start;   // tokens further right are no sequence's
  __syncthreads();

  // scan this tile, tell the others, and learn what stands behind it
  unsigned ends[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int q = offset + row * kRowTokens;
    ends[row] = ends_of_vector(shared.sequences, q);
    if (used < q + kVector) mask[row] &= used <= q ? 0u : 0xffffffffu >> (8 * (q + kVector - used));
  }
  const auto responds = [&](int row, int i) { return ((mask[row] >> (8 * i)) & 0xffu) != 0; };
  const auto x = [&](int row, int i) {   // selected, never multiplied: padding may hold NaN
    const float d = clamped_log_ratio(log_ratio[row][i]);
    return responds(row, i) && d <= launch.rules.log_dual_clip ? d : 0.0f;
  };
  const WarpScan scan = scan_warp(ends, shared.sequences.carry, offset, x, launch.gamma);
  if (lane == 0) {
    shared.warps.total[warp] = scan.total;
    shared.warps.has_end[warp] = scan.has_end;
  }
  __syncthreads();
  const bool closed = last_token_ends(shared.sequences);
  if (warp == 0) {
    const float carry = exchange_carries(launch.workspace, claim, launch.tiles, shared.warps, closed, launch.gamma);
    if (lane == 0) shared.carry = carry;
  }
  async_wait();
  __syncthreads();

  // losses, rows from right to left
  const uint64_t words = words_with_ends(shared.sequences);
  const bool mixed = (words << 1) != 0 || (words != 0 && (shared.sequences.ends[kEndWords - 1] << 1) != 0);
  float carry = carry_across_warps(shared.warps, warp + 1, shared.carry, launch.gamma);
  const float lane_power = power_below_32(launch.gamma.vectors, 31 - lane);
  TokenStatistics statistics;
  int beyond_c = 0;
#pragma unroll
  for (int row = kRows - 1; row >= 0; --row) {
    const int q = offset + row * kRowTokens;
    float future_kl[kVector];
    finish_row(
        scan, row, ends[row], shared.sequences.carry + q, carry, lane_power, [&](int, int i) { return x(row, i); },
        launch.gamma, future_kl);
    carry = next_row(scan, row, carry, launch.gamma);

    float sequence_advantage = 0.0f;
    if (!in.advantage_is_per_token) {
      const int end = mixed ? next_end(shared.sequences, words, q + kVector - 1) : closed ? kTile - 1 : -1;
      sequence_advantage = end < 0 ? shared.tail_advantage : shared.advantage[end];
    }
    float loss[kVector], grad[kVector], weight[kVector];
    unsigned flags = 0;
#pragma unroll
    for (int i = kVector - 1; i >= 0; --i) {
      float advantage;
      if (in.advantage_is_per_token) {
        advantage = shared.advantage[q + i];
      } else {
        if (mixed && (ends[row] >> i) & 1u) sequence_advantage = shared.advantage[q + i];
        advantage = sequence_advantage;
      }
      if (kAggregate) {
        const float r = __expf(clamped_log_ratio(log_ratio[row][i]));
        const bool beyond = responds(row, i) && is_beyond_c(r, advantage, launch.rules);
        beyond_c += beyond;
        if (beyond) flags |= static_cast<unsigned>(kBeyondFlag) << (8 * i);
      } else {
        const float token_weight = in.token_weight ? shared.value[q + i] : 1.0f;
        const TokenResult token = token_loss(log_ratio[row][i], responds(row, i), future_kl[i], advantage, token_weight,
                                             launch.rules, statistics);
        loss[i] = token.loss, grad[i] = token.grad, weight[i] = token.weight;
        flags |= ((responds(row, i) ? kResponseFlag : 0u) | (token.beyond_c ? kBeyondFlag : 0u)) << (8 * i);
      }
    }
    if (!kAggregate) {
      statistics.loss += (loss[0] + loss[1]) + (loss[2] + loss[3]);
      store_tokens<kAligned>(launch.loss.grad + start + q, valid(row), grad);
      store_tokens<kAligned>(launch.loss.weight + start + q, valid(row), weight);
    }
    if (mixed) shared.flags[q / kVector] = flags;
    if (mixed || kAggregate) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) shared.value[q + i] = kAggregate ? future_kl[i] : loss[i];
    }
  }

  // sums: of the block, of its sequences, of all blocks
  if (kAggregate) {
    beyond_c = warp_sum(beyond_c);
    if (lane == 0) shared.beyond_c[warp] = beyond_c;
  } else {
    reduce_warp(statistics, shared.statistics);
  }
  __syncthreads();
  if (!kAggregate) reduce_block(shared.statistics);
  if (mixed) {
    sum_mixed_tile<!kAggregate>(shared.sequences, shared.marks, shared.value,
                                reinterpret_cast<const unsigned char*>(shared.flags),
                                [&](int64_t s, const Sums& sums) { write_sequence<kAggregate>(launch, s, sums); });
    __syncthreads();
  } else {
    __syncthreads();
    if (tid == 0) {   // one piece: the whole tile
      Sums sums = {0.0, 0, 0};
      for (int w = 0; w < kWarps; ++w) {
        sums.loss += kAggregate ? 0.0 : shared.statistics.loss[w];
        if (kAggregate) sums.beyond_c += shared.beyond_c[w];
      }
      if (!kAggregate) {
        sums.tokens = static_cast<int>(shared.statistics.block[sum::tokens]);
        sums.beyond_c = static_cast<int>(shared.statistics.block[sum::dual_clipped]);
      }
      if (closed && !shared.marks.head_ends) write_sequence<kAggregate>(launch, shared.marks.sequence[kTile - 1], sums);
      shared.marks.head_sums = shared.marks.tail_sums = sums;
    }
    __syncthreads();
  }
  add_parts<kAggregate>(launch, claim.tile, shared.marks);
  if (kAggregate) {
    for (int64_t s = first_sequence + tid; s < in.sequences.count; s += kThreads) {
      const int64_t begin = offset_of(in.sequences, s);
      if (begin >= start + kTile) break;
      if (begin >= start && begin < offset_of(in.sequences, s + 1))
        launch.aggregate.aggregate[s] = shared.value[begin - start];
    }
    finish_block(launch.workspace, claim.epoch, launch.tiles);
  } else if (climb_tree(launch.workspace, claim.tile, launch.tiles, shared.statistics)) {
    if (tid < kNumStatistics) launch.loss.statistics[tid] = shared.statistics.block[tid];
    if (tid == 0) reset_header(launch.workspace, claim.epoch);
  }
}

template <bool kAggregate>
int launch_kernel(const LossLaunch& launch, void* stream) {
  const LossArguments& in = launch.in;
  const uintptr_t vector = in.bf16 ? 8 : 16;
  const bool aligned =
      aligned_to(in.logp, vector) && aligned_to(in.old_logp, vector) && aligned_to(in.response_mask, 4) &&
      (!in.advantage_is_per_token || aligned_to(in.advantage, 16)) && aligned_to(in.token_weight, 16) &&
      aligned_to(launch.loss.grad, 16) && aligned_to(launch.loss.weight, 16);
  const auto run = [&](auto kernel) { MEGATRON_FIPO_LAUNCH(kernel, launch.tiles, kThreads, stream, launch); };
  if (in.bf16)
    aligned ? run(fipo_kernel<Bf16, true, kAggregate>) : run(fipo_kernel<Bf16, false, kAggregate>);
  else
    aligned ? run(fipo_kernel<float, true, kAggregate>) : run(fipo_kernel<float, false, kAggregate>);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int fipo_loss(const LossArguments& arguments, const FipoParams& params, const LossResults& results,
              const WorkspaceMemory& workspace, void* stream) {
  return launch_kernel<false>({arguments,
                               results,
                               {},
                               loss_rules(params),
                               gamma_powers(params.gamma),
                               workspace_of(workspace),
                               tiles_of(arguments.num_tokens)},
                              stream);
}

int future_kl_aggregate(const LossArguments& arguments, const FipoParams& params, const AggregateResults& results,
                        const WorkspaceMemory& workspace, void* stream) {
  return launch_kernel<true>({arguments,
                              {},
                              results,
                              loss_rules(params),
                              gamma_powers(params.gamma),
                              workspace_of(workspace),
                              tiles_of(arguments.num_tokens)},
                             stream);
}

}  // namespace megatron_fipo::cuda
