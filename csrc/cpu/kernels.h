// The table of CPU kernels: one table per instruction set, chosen once per process (dispatch.cpp).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

#include "core/fipo.h"
#include "core/statistics.h"
#include "cpu/capability.h"

namespace megatron_fipo {

constexpr int kMaxLanes = 16;       // floats of the widest register
constexpr int kChunkTokens = 512;   // that the loss takes at once

// Powers of gamma, taken in double and rounded once.
struct Discount {
  explicit Discount(double gamma) : gamma(gamma) {
    power[0] = 1.0;
    for (int k = 1; k <= 4 * kMaxLanes; ++k) power[k] = power[k - 1] * gamma;
    for (int k = 0; k < kMaxLanes; ++k) {
      descending[k] = static_cast<float>(power[kMaxLanes - k]);
      ascending[kMaxLanes + k] = static_cast<float>(power[k + 1]);
    }
    for (int lane = 0; lane < kMaxLanes; ++lane) {
      double value = power[kMaxLanes - lane];
      for (int base = kChunkTokens - kMaxLanes; base >= 0; base -= kMaxLanes, value *= power[kMaxLanes])
        chunk[base + lane] = static_cast<float>(value);
    }
  }
  double gamma;
  double power[4 * kMaxLanes + 1];
  alignas(64) float descending[2 * kMaxLanes] = {};   // gamma^(16 - k), 0 from k = 16 on
  alignas(64) float ascending[2 * kMaxLanes] = {};    // gamma^(k - 15), 0 below k = 16
  alignas(64) float chunk[kChunkTokens];              // gamma^(kChunkTokens - k)
};

// Tokens [begin, end) of one sequence, counted from the start of the pack. Kernels cut it where the token index is a
// multiple of the register's width, so loads and stores are aligned and results depend on the packing alone.
struct Run {
  int64_t begin, end, sequence;
  int64_t size() const { return end - begin; }
};

// Running statistics, one per lane, so that they are added up once per work item and not once per sequence.
struct alignas(64) LaneStatistics {
  LaneStatistics() {
    for (Range* range : {&future_kl, &safe_future_kl, &safe_weight, &negative_log_ratio, &positive_log_ratio})
      for (int lane = 0; lane < kMaxLanes; ++lane) {
        range->low[lane] = std::numeric_limits<float>::infinity();
        range->high[lane] = -std::numeric_limits<float>::infinity();
      }
  }
  struct Range {
    float low[kMaxLanes], high[kMaxLanes];
  };
  double log_ratio[kMaxLanes] = {}, weight[kMaxLanes] = {}, raw_weight[kMaxLanes] = {};
  // Of tokens whose weight the safety rule has set, and of all others. exp and clip are monotone, so the others' range of
  // F gives their range of weights.
  Range future_kl, safe_future_kl, safe_weight;
  Range negative_log_ratio, positive_log_ratio;
  int64_t counts[sum::count] = {};   // of the sums that count tokens
};

struct Kernels {
  // y[t] = x[t] + gamma * y[t +- 1]. Returns the value at the last token reached, which is the carry of whatever follows.
  // y may be null (only the carry is wanted) or equal to x. streaming: y, aligned to 64 bytes, goes past the caches.
  double (*scan_reverse)(const float* x, float* y, const Run& run, const Discount& discount, double carry, bool streaming);
  double (*scan_forward)(const float* x, float* y, const Run& run, const Discount& discount, double carry, bool streaming);

  // The future KL at the run's first token, with nothing behind the run; adds its tokens beyond c to `beyond_c`.
  double (*future_kl_aggregate)(const TokenInput& in, const Run& run, const FipoParams& params, const Discount& discount,
                                int64_t& beyond_c);

  // Losses, gradients and weights of a run whose future KL continues with `carry` behind its last token.
  void (*fipo_loss)(const TokenInput& in, const Run& run, const FipoParams& params, const Discount& discount, double carry,
                    const TokenOutput& out, bool streaming, SequenceSums& sums, LaneStatistics& statistics);

  // y[t] = x[t] * factor
  void (*scale)(const float* x, float* y, const Run& run, float factor, bool streaming);
};

extern const Kernels kPortableKernels;
#ifdef MEGATRON_FIPO_X86
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

const Kernels& kernels();

}  // namespace megatron_fipo
