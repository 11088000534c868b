#include "cpu/packed.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels.h"

namespace megatron_fipo {
namespace {

constexpr int64_t kBlock = 16384;            // tokens
constexpr int64_t kWholeSequence = 2 * kBlock;   // up to here a sequence is one work item
constexpr int64_t kTokensPerThread = 8192;   // a thread is not worth waking for less

// Tokens [begin, end) of one sequence. starts_scan: the first block of its sequence in scan order.
struct Block {
  int64_t begin, end, sequence;
  bool starts_scan;
  int64_t size() const { return end - begin; }
};

// In scan order, so that the block which hands its carry to blocks[i] is blocks[i - 1].
std::vector<Block> cut(const std::vector<int64_t>& offsets, bool reverse) {
  std::vector<Block> blocks;
  for (int64_t s = 0; s + 1 < static_cast<int64_t>(offsets.size()); ++s) {
    const int64_t begin = offsets[s], end = offsets[s + 1], size = end - begin;
    const int64_t step = size <= kWholeSequence ? size : kBlock;
    for (int64_t done = 0; done < size; done += step) {
      const int64_t count = std::min(step, size - done);
      const int64_t at = reverse ? end - done - count : begin + done;
      blocks.push_back({at, at + count, s, done == 0});
    }
  }
  return blocks;
}

// Runs body(i) for every block, in contiguous pieces of about equal numbers of tokens.
void for_each(const std::vector<Block>& blocks, const Parallel& parallel, const std::function<void(size_t)>& body) {
  int64_t total = 0;
  for (const Block& block : blocks) total += block.size();
  const int64_t pieces = std::clamp<int64_t>(total / kTokensPerThread, 1, parallel.threads);
  std::vector<size_t> bounds = {0};
  int64_t seen = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    seen += blocks[i].size();
    while (static_cast<int64_t>(bounds.size()) < pieces && seen * pieces >= total * static_cast<int64_t>(bounds.size()))
      bounds.push_back(i + 1);
  }
  bounds.push_back(blocks.size());
  const auto run_pieces = [&](int64_t first, int64_t last) {
    for (size_t i = bounds[first]; i < bounds[last]; ++i) body(i);
  };
  const int64_t count = static_cast<int64_t>(bounds.size()) - 1;
  if (count == 1)
    run_pieces(0, 1);
  else
    parallel.run(count, run_pieces);
}

// The carry into every block. aggregate(block) is the block's own carry out when nothing comes in.
std::vector<double> carries(const std::vector<Block>& blocks, double gamma, const double* carry,
                            const Parallel& parallel, const std::function<double(const Block&)>& aggregate) {
  std::vector<double> own(blocks.size(), 0.0), in(blocks.size(), 0.0);
  const auto feeds_next = [&](size_t i) { return i + 1 < blocks.size() && !blocks[i + 1].starts_scan; };
  if (std::any_of(blocks.begin(), blocks.end(), [](const Block& block) { return !block.starts_scan; }))
    for_each(blocks, parallel, [&](size_t i) {
      if (feeds_next(i)) own[i] = aggregate(blocks[i]);
    });
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i].starts_scan)
      in[i] = carry ? carry[blocks[i].sequence] : 0.0;
    else
      in[i] = own[i - 1] + std::pow(gamma, static_cast<double>(blocks[i - 1].size())) * in[i - 1];
  }
  return in;
}

}  // namespace

void packed_scan(const float* x, float* y, const std::vector<int64_t>& offsets, int64_t num_tokens, double gamma,
                 bool reverse, const double* carry, const Parallel& parallel) {
  const auto scan = reverse ? kernels().scan_reverse : kernels().scan_forward;
  const std::vector<Block> blocks = cut(offsets, reverse);
  const std::vector<double> in = carries(blocks, gamma, carry, parallel, [&](const Block& block) {
    return scan(x + block.begin, nullptr, block.size(), gamma, 0.0);
  });
  for_each(blocks, parallel, [&](size_t i) {
    scan(x + blocks[i].begin, y + blocks[i].begin, blocks[i].size(), gamma, in[i]);
  });
  std::fill(y + offsets.back(), y + num_tokens, 0.0f);
}

// fp64 serves gradient checks and oracles: no blocks, one plain loop per sequence.
void packed_scan(const double* x, double* y, const std::vector<int64_t>& offsets, int64_t num_tokens, double gamma,
                 bool reverse, const double* carry, const Parallel& parallel) {
  parallel.run(static_cast<int64_t>(offsets.size()) - 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t begin = offsets[s], end = offsets[s + 1];
      double value = carry ? carry[s] : 0.0;
      for (int64_t done = 0; done < end - begin; ++done) {
        const int64_t t = reverse ? end - 1 - done : begin + done;
        value = x[t] + gamma * value;
        y[t] = value;
      }
    }
  });
  std::fill(y + offsets.back(), y + num_tokens, 0.0);
}

namespace {

TokenInput tokens_of(const Block& block, const TokenInput& in) {
  return {in.logp + block.begin,
          in.old_logp + block.begin,
          in.response_mask + block.begin,
          in.advantage + (in.advantage_is_per_token ? block.begin : block.sequence),
          in.advantage_is_per_token,
          in.token_weight ? in.token_weight + block.begin : nullptr};
}

Statistics no_statistics() {
  Statistics none = {};
  std::fill_n(none.minima, extremum::count, std::numeric_limits<double>::infinity());
  std::fill_n(none.maxima, extremum::count, -std::numeric_limits<double>::infinity());
  return none;
}

void merge(Statistics& total, const Statistics& other) {
  for (int i = 0; i < sum::count; ++i) total.sums[i] += other.sums[i];
  for (int i = 0; i < extremum::count; ++i) {
    total.minima[i] = std::min(total.minima[i], other.minima[i]);
    total.maxima[i] = std::max(total.maxima[i], other.maxima[i]);
  }
}

}  // namespace

LossSums packed_fipo_loss(const TokenInput& in, const TokenOutput& out, const std::vector<int64_t>& offsets,
                          int64_t num_tokens, const FipoParams& params, const double* carry, const Parallel& parallel) {
  const std::vector<Block> blocks = cut(offsets, /*reverse=*/true);
  const std::vector<double> carry_in = carries(blocks, params.gamma, carry, parallel, [&](const Block& block) {
    int64_t beyond_c = 0;
    return kernels().future_kl_aggregate(tokens_of(block, in), block.size(), params, beyond_c);
  });
  std::vector<SequenceSums> block_sums(blocks.size());
  std::vector<Statistics> block_statistics(blocks.size(), no_statistics());
  for_each(blocks, parallel, [&](size_t i) {
    const int64_t begin = blocks[i].begin;
    kernels().fipo_loss(tokens_of(blocks[i], in), blocks[i].size(), params, carry_in[i],
                        {out.grad + begin, out.weight + begin}, block_sums[i], block_statistics[i]);
  });
  LossSums sums = {std::vector<SequenceSums>(offsets.size() - 1), no_statistics()};
  for (size_t i = 0; i < blocks.size(); ++i) {
    SequenceSums& total = sums.sequences[blocks[i].sequence];
    total.loss += block_sums[i].loss;
    total.tokens += block_sums[i].tokens;
    total.dual_clipped += block_sums[i].dual_clipped;
    merge(sums.statistics, block_statistics[i]);
  }
  const int64_t used = offsets.back();
  std::fill(out.grad + used, out.grad + num_tokens, 0.0f);
  std::fill(out.weight + used, out.weight + num_tokens, std::clamp(1.0f, params.weight_low, params.weight_high));
  return sums;
}

std::vector<Aggregate> packed_future_kl_aggregate(const TokenInput& in, const std::vector<int64_t>& offsets,
                                                  const FipoParams& params, const Parallel& parallel) {
  const std::vector<Block> blocks = cut(offsets, /*reverse=*/true);
  std::vector<Aggregate> own(blocks.size()), sequences(offsets.size() - 1);
  for_each(blocks, parallel, [&](size_t i) {
    own[i].future_kl =
        kernels().future_kl_aggregate(tokens_of(blocks[i], in), blocks[i].size(), params, own[i].beyond_c);
  });
  for (size_t i = 0; i < blocks.size(); ++i) {
    Aggregate& total = sequences[blocks[i].sequence];
    total.future_kl =
        own[i].future_kl + std::pow(params.gamma, static_cast<double>(blocks[i].size())) * total.future_kl;
    total.beyond_c += own[i].beyond_c;
  }
  return sequences;
}

void packed_scale(const float* x, const double* scale, float* y, const std::vector<int64_t>& offsets,
                  int64_t num_tokens, const Parallel& parallel) {
  const std::vector<Block> blocks = cut(offsets, /*reverse=*/false);
  for_each(blocks, parallel, [&](size_t i) {
    const float factor = static_cast<float>(scale[blocks[i].sequence]);
    for (int64_t t = blocks[i].begin; t < blocks[i].end; ++t) y[t] = x[t] * factor;
  });
  std::fill(y + offsets.back(), y + num_tokens, 0.0f);
}

}  // namespace megatron_fipo
