// The table of CPU kernels: one table per instruction set, chosen once per process (dispatch.cpp).
#pragma once

#include <cstdint>

#include "core/fipo.h"
#include "core/statistics.h"

namespace megatron_fipo {

struct Kernels {
  // y[t] = x[t] + gamma * y[t +- 1] over n tokens of one sequence. Returns the value at the last token reached, which is
  // the carry of whatever follows. y may be null (only the carry is wanted) or equal to x.
  double (*scan_reverse)(const float* x, float* y, int64_t n, double gamma, double carry);
  double (*scan_forward)(const float* x, float* y, int64_t n, double gamma, double carry);

  // The future KL at the run's first token, with nothing behind the run; adds its tokens beyond c to `beyond_c`.
  double (*future_kl_aggregate)(const TokenInput& in, int64_t n, const FipoParams& params, int64_t& beyond_c);

  // Losses, gradients and weights of a run whose future KL continues with `carry` behind its last token.
  void (*fipo_loss)(const TokenInput& in, int64_t n, const FipoParams& params, double carry, const TokenOutput& out,
                    SequenceSums& sums, Statistics& statistics);
};

extern const Kernels kPortableKernels;

const Kernels& kernels();

}  // namespace megatron_fipo
