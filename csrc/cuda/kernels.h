// The CUDA kernels as the bindings call them: raw device pointers and a stream, no CUDA header, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/fipo.h"

namespace megatron_fipo::cuda {

// cu_seqlens on the device: count + 1 ascending offsets from 0, int64 if wide, else int32. Not checked (that would wait
// for the device): wrong offsets are undefined behaviour, as for every operator that takes cu_seqlens.
struct PackedSequences {
  const void* offsets;
  bool wide;
  int64_t count;
};

// Memory that blocks of one launch exchange partial results through. Zeroed once when allocated; every launch leaves it
// ready for the next, so launches that share it must follow each other (one per stream). The capacity fixes its layout.
struct WorkspaceMemory {
  void* data;
  int64_t tokens;   // the most tokens of a launch
};
size_t workspace_bytes(int64_t tokens);

struct ScanArguments {
  const float* x;        // [T]
  float* y;              // [T], may be x
  const double* carry;   // [S] or null: the value just past each sequence's end (reverse) or before its start
  int64_t num_tokens;
  PackedSequences sequences;
};

struct LossArguments {
  const void* logp;               // [T] fp32, or bf16
  const void* old_logp;           // [T] likewise
  bool bf16;
  const uint8_t* response_mask;   // [T]
  const float* advantage;         // [T] or [S]
  bool advantage_is_per_token;
  const float* token_weight;      // [T] or null: all ones
  const double* carry;            // [S] or null: the future KL just past each sequence's end
  int64_t num_tokens;
  PackedSequences sequences;
};

struct LossResults {
  double* loss;          // [S]
  int64_t* counts;       // [S, 2]: response tokens, those beyond c
  float* grad;           // [T]
  float* weight;         // [T]
  double* statistics;    // [kNumStatistics]
};

struct AggregateResults {
  float* aggregate;    // [S]: the future KL at the sequence's first token, with nothing behind the sequence
  int32_t* beyond_c;   // [S]
};

// These return a cudaError_t; describe() puts it into words.
int discounted_scan(const ScanArguments& arguments, double gamma, bool reverse, const WorkspaceMemory& workspace,
                    void* stream);
int discounted_scan(const double* x, double* y, const double* carry, int64_t num_tokens,
                    const PackedSequences& sequences, double gamma, bool reverse, void* stream);
int fipo_loss(const LossArguments& arguments, const FipoParams& params, const LossResults& results,
              const WorkspaceMemory& workspace, void* stream);
int future_kl_aggregate(const LossArguments& arguments, const FipoParams& params, const AggregateResults& results,
                        const WorkspaceMemory& workspace, void* stream);

// y[t] = x[t] * scale[sequence of t], 0 behind the last sequence.
int scale_per_sequence(const float* x, const double* scale, float* y, int64_t num_tokens,
                       const PackedSequences& sequences, void* stream);

int zero(void* data, size_t bytes, void* stream);
int is_capturing(void* stream, bool* capturing);
const char* describe(int error);

}  // namespace megatron_fipo::cuda
