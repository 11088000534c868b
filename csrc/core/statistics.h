// What a pass over the tokens counts for the metrics. The one place that knows names and order: kernels index by the
// enums, the operators return `sums, minima, maxima` as one vector, and Python asks megatron_fipo._host for the names.
#pragma once

namespace megatron_fipo {

// Over response tokens, with d the clamped log-ratio, r = exp(d), F the future KL, f the weight, c the dual clip.
#define MEGATRON_FIPO_SUMS(X)                                                                   \
  X(tokens)                                                                                     \
  X(log_ratio)      /* d */                                                                     \
  X(clipped)        /* r beyond the clip range, on the side that its advantage bounds */        \
  X(dual_clipped)   /* A < 0 and r > c */                                                       \
  X(weight)         /* f */                                                                     \
  X(raw_weight)     /* exp(F) */                                                                \
  X(weight_at_high) /* f >= weight_high; this and the next are 0 for the range [0, 10] */       \
  X(weight_at_low)  /* f <= weight_low */                                                       \
  X(active)         /* f != 1 */                                                                \
  X(negative_2_3)   /* A < 0 and r in [2, 3) */                                                 \
  X(negative_3_4)                                                                               \
  X(negative_4_c)                                                                               \
  X(positive_small) /* A > 0 and r < 1e-3 */

// Minimum and maximum each; +inf and -inf where no token contributes.
#define MEGATRON_FIPO_EXTREMA(X) \
  X(weight)                      \
  X(raw_weight)                  \
  X(negative_log_ratio)          \
  X(positive_log_ratio)

#define MEGATRON_FIPO_ENUMERATOR(name) name,
namespace sum {
enum : int { MEGATRON_FIPO_SUMS(MEGATRON_FIPO_ENUMERATOR) count };
}
namespace extremum {
enum : int { MEGATRON_FIPO_EXTREMA(MEGATRON_FIPO_ENUMERATOR) count };
}
#undef MEGATRON_FIPO_ENUMERATOR

#define MEGATRON_FIPO_NAME(name) #name,
constexpr const char* kSumNames[] = {MEGATRON_FIPO_SUMS(MEGATRON_FIPO_NAME)};
constexpr const char* kExtremumNames[] = {MEGATRON_FIPO_EXTREMA(MEGATRON_FIPO_NAME)};
#undef MEGATRON_FIPO_NAME

// The released code takes the weight as unclipped when its range is [0, 10].
constexpr float kUnclippedLow = 0.0f, kUnclippedHigh = 10.0f;
// A > 0 and r below it: `positive_small`.
constexpr float kSmallRatio = 1e-3f;

struct Statistics {
  double sums[sum::count];
  double minima[extremum::count];
  double maxima[extremum::count];
};
constexpr int kNumStatistics = sum::count + 2 * extremum::count;
static_assert(sizeof(Statistics) == kNumStatistics * sizeof(double), "the operators copy it as a vector");

}  // namespace megatron_fipo
