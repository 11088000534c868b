// The operators on packed sequences: cuts the tokens into work items and runs the kernels on them.
//
// The cut depends on the sequences only, never on the number of threads, so results are bitwise the same for any number.
// A long sequence is cut into blocks: first each block's aggregate, then the carries between blocks, then the blocks.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/fipo.h"
#include "core/statistics.h"

namespace megatron_fipo {

// Runs body(begin, end) over pieces of [0, n), at most `threads` of them at once.
struct Parallel {
  int64_t threads;
  std::function<void(int64_t n, const std::function<void(int64_t begin, int64_t end)>& body)> run;
};

// offsets: S + 1 ascending token offsets. carry: null or [S]. Tokens from offsets.back() to num_tokens give 0.
void packed_scan(const float* x, float* y, const std::vector<int64_t>& offsets, int64_t num_tokens, double gamma,
                 bool reverse, const double* carry, const Parallel& parallel);
void packed_scan(const double* x, double* y, const std::vector<int64_t>& offsets, int64_t num_tokens, double gamma,
                 bool reverse, const double* carry, const Parallel& parallel);

// `in` and `out` point at the first token; in.advantage at [T] or [S].
struct LossSums {
  std::vector<SequenceSums> sequences;
  Statistics statistics;
};
LossSums packed_fipo_loss(const TokenInput& in, const TokenOutput& out, const std::vector<int64_t>& offsets,
                          int64_t num_tokens, const FipoParams& params, const double* carry, const Parallel& parallel);

// Each sequence's future KL at its first token with nothing behind its last, and its tokens beyond c.
struct Aggregate {
  double future_kl = 0.0;
  int64_t beyond_c = 0;
};
std::vector<Aggregate> packed_future_kl_aggregate(const TokenInput& in, const std::vector<int64_t>& offsets,
                                                  const FipoParams& params, const Parallel& parallel);

// y[t] = x[t] * scale[sequence of t]; tokens from offsets.back() to num_tokens give 0.
void packed_scale(const float* x, const double* scale, float* y, const std::vector<int64_t>& offsets,
                  int64_t num_tokens, const Parallel& parallel);

}  // namespace megatron_fipo
