// The loss of one token whose future KL is known (the formulas of megatron_fipo/loss/fipo.py), and what is counted of
// it.
#pragma once

#include <cmath>
#include <limits>

#include "core/fipo.h"
#include "core/statistics.h"
#include "cuda/device.h"

namespace megatron_fipo::cuda {

// FipoParams in the form in which the kernel compares and multiplies.
struct LossRules {
  float weight_low, weight_high;
  float safety_threshold, safe_low, safe_high;
  float ratio_low, ratio_high;
  float dual_clip, log_dual_clip;
  bool caps_loss;              // not in the paper's rules
  float at_high, at_low;       // weights that count as clipped; out of reach for the range [0, 10]
  float neutral_weight;        // of tokens outside the response
};

inline LossRules loss_rules(const FipoParams& p) {
  const float infinity = std::numeric_limits<float>::infinity();
  const bool unclipped = p.weight_low == kUnclippedLow && p.weight_high == kUnclippedHigh;
  LossRules rules;
  rules.weight_low = p.weight_low, rules.weight_high = p.weight_high;
  rules.safety_threshold = p.safety_threshold;
  rules.safe_low = p.paper ? 1.0f : kSafeWeightLow, rules.safe_high = p.paper ? 1.0f : kSafeWeightHigh;
  rules.ratio_low = 1.0f - p.clip_low, rules.ratio_high = 1.0f + p.clip_high;
  rules.dual_clip = p.dual_clip, rules.log_dual_clip = p.log_dual_clip;
  rules.caps_loss = !p.paper;
  rules.at_high = unclipped ? infinity : p.weight_high, rules.at_low = unclipped ? -infinity : p.weight_low;
  rules.neutral_weight = std::fmin(std::fmax(1.0f, p.weight_low), p.weight_high);
  return rules;
}

// A NaN passes, so that a NaN log-prob in the response shows in loss and gradient.
__device__ __forceinline__ float clamp(float x, float low, float high) { return min_nan(max_nan(x, low), high); }
__device__ __forceinline__ float clamped_log_ratio(float raw) { return clamp(raw, -kMaxLogRatio, kMaxLogRatio); }

// One lane's tokens. Counts stay below 256, so four share a word.
struct TokenStatistics {
  double loss = 0.0;
  float log_ratio = 0.0f, weight = 0.0f, raw_weight = 0.0f;
  unsigned tokens_clipped_active_dual = 0;   // bytes, low first
  unsigned high_low_2_3 = 0;
  unsigned from_4_small = 0;
  float minima[extremum::count], maxima[extremum::count];

  __device__ __forceinline__ TokenStatistics() {
#pragma unroll
    for (int i = 0; i < extremum::count; ++i) {
      minima[i] = __uint_as_float(0x7f800000u);
      maxima[i] = __uint_as_float(0xff800000u);
    }
  }
  __device__ __forceinline__ void extend(int which, float value) {
    minima[which] = fminf(minima[which], value);
    maxima[which] = fmaxf(maxima[which], value);
  }
};

struct TokenResult {
  float loss, grad, weight;
  bool beyond_c;
};

__device__ __forceinline__ bool is_beyond_c(float r, float advantage, const LossRules& rules) {
  return advantage < 0.0f && r > rules.dual_clip;
}

// raw: logp - old_logp. advantage and token_weight may be anything outside the response.
__device__ __forceinline__ TokenResult token_loss(float raw, bool response, float future_kl, float advantage,
                                                  float token_weight, const LossRules& rules,
                                                  TokenStatistics& statistics) {
  const float a = response ? advantage : 0.0f;
  const bool negative = a < 0.0f, positive = a > 0.0f;
  const float d = clamped_log_ratio(raw), r = __expf(d);
  const float clipped_r = clamp(r, rules.ratio_low, rules.ratio_high);

  const float raw_f = __expf(clamp(future_kl, -kMaxFutureKl, kMaxFutureKl));
  float f = clamp(raw_f, rules.weight_low, rules.weight_high);
  if (negative && r > rules.safety_threshold) f = clamp(f, rules.safe_low, rules.safe_high);

  const float w = a * f * token_weight;
  const float l1 = -w * r, l2 = -w * clipped_r;
  const bool beyond_c = is_beyond_c(r, a, rules), capped = beyond_c && rules.caps_loss;
  const bool clipped = (negative && r < rules.ratio_low) || (positive && r > rules.ratio_high);
  const bool clamped = fabsf(raw) > kMaxLogRatio;

  TokenResult result;
  result.loss = response ? (capped ? -w * rules.dual_clip : max_nan(l1, l2)) : 0.0f;
  result.grad = response && !(capped || clipped || clamped) ? l1 : 0.0f;
  result.weight = response ? f : rules.neutral_weight;
  result.beyond_c = beyond_c;

  if (response) {
    statistics.log_ratio += d;
    statistics.weight += f;
    statistics.raw_weight += raw_f;
    statistics.tokens_clipped_active_dual += 1u + (clipped ? 1u << 8 : 0u) + (f != 1.0f ? 1u << 16 : 0u);
    if (f >= rules.at_high) statistics.high_low_2_3 += 1u;
    if (f <= rules.at_low) statistics.high_low_2_3 += 1u << 8;
    if (beyond_c) statistics.tokens_clipped_active_dual += 1u << 24;
    statistics.extend(extremum::weight, f);
    statistics.extend(extremum::raw_weight, raw_f);
  }
  if (negative) statistics.extend(extremum::negative_log_ratio, d);
  if (positive) statistics.extend(extremum::positive_log_ratio, d);
  // far from 1 there are few tokens: mostly the whole warp skips this
  if (negative && r >= 2.0f) {
    if (r < 3.0f) statistics.high_low_2_3 += 1u << 16;
    if (r >= 3.0f && r < 4.0f) statistics.high_low_2_3 += 1u << 24;
    if (r >= 4.0f && r < rules.dual_clip) statistics.from_4_small += 1u;
  }
  if (positive && r < kSmallRatio) statistics.from_4_small += 1u << 8;
  return result;
}

}  // namespace megatron_fipo::cuda
