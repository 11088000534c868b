// Plain structs shared by the kernels and the bindings: no torch, no Python.
#pragma once

#include <cstdint>

namespace megatron_fipo {

// Log-ratios are clamped to +-kMaxLogRatio before anything else uses them.
constexpr float kMaxLogRatio = 20.0f;
// exp(F) saturates at exp(+-kMaxFutureKl), so that an unbounded weight times a ratio stays finite in fp32.
constexpr float kMaxFutureKl = 80.0f;
// The official safety rule clamps the weight into this range.
constexpr float kSafeWeightLow = 0.8f, kSafeWeightHigh = 1.0f;

struct FipoParams {
  double gamma;             // 2^(-1/half_life); rounding it to fp32 would be the largest numeric error
  float weight_low;         // range of the influence weight
  float weight_high;
  float safety_threshold;   // A < 0 and r above it: the weight is reset
  float dual_clip;          // c
  float log_dual_clip;      // ln c: tokens above it do not enter the future KL
  float clip_low;           // r is clipped to [1 - clip_low, 1 + clip_high]
  float clip_high;
  bool paper;               // the paper's rules: safety sets f = 1, no dual clip
};

// Pointers to token 0 of the pack.
struct TokenInput {
  const float* logp;
  const float* old_logp;
  const uint8_t* response_mask;
  const float* advantage;      // per token or per sequence
  bool advantage_is_per_token;
  const float* token_weight;   // may be null: all ones
};

struct TokenOutput {
  float* grad;     // d(loss of the token) / d(logp), 0 outside the response
  float* weight;   // f; outside the response that of F = 0
};

struct SequenceSums {
  double loss = 0.0;          // sum of token losses
  int64_t tokens = 0;         // response tokens
  int64_t dual_clipped = 0;   // A < 0 and max(r, clip(r)) > c: does not depend on f
};

}  // namespace megatron_fipo
