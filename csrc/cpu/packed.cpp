#include "cpu/packed.h"

#include <algorithm>
#include <cmath>

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

std::vector<SequenceSums> packed_fipo_loss(const TokenInput& in, const TokenOutput& out,
                                           const std::vector<int64_t>& offsets, int64_t num_tokens,
                                           const FipoParams& params, const double* carry, const Parallel& parallel) {
  const std::vector<Block> blocks = cut(offsets, /*reverse=*/true);
  const auto tokens_of = [&](const Block& block) {
    return TokenInput{in.logp + block.begin,
                      in.old_logp + block.begin,
                      in.response_mask + block.begin,
                      in.advantage + (in.advantage_is_per_token ? block.begin : block.sequence),
                      in.advantage_is_per_token,
                      in.token_weight ? in.token_weight + block.begin : nullptr};
  };
  const std::vector<double> carry_in = carries(blocks, params.gamma, carry, parallel, [&](const Block& block) {
    return kernels().future_kl_aggregate(tokens_of(block), block.size(), params);
  });
  std::vector<SequenceSums> block_sums(blocks.size());
  for_each(blocks, parallel, [&](size_t i) {
    const int64_t begin = blocks[i].begin;
    kernels().fipo_loss(tokens_of(blocks[i]), blocks[i].size(), params, carry_in[i],
                        {out.grad + begin, out.weight + begin, out.future_kl + begin}, block_sums[i]);
  });
  std::vector<SequenceSums> sums(offsets.size() - 1);
  for (size_t i = 0; i < blocks.size(); ++i) {
    SequenceSums& total = sums[blocks[i].sequence];
    total.loss += block_sums[i].loss;
    total.tokens += block_sums[i].tokens;
    total.dual_clipped += block_sums[i].dual_clipped;
  }
  const int64_t used = offsets.back();
  std::fill(out.grad + used, out.grad + num_tokens, 0.0f);
  std::fill(out.future_kl + used, out.future_kl + num_tokens, 0.0f);
  std::fill(out.weight + used, out.weight + num_tokens, std::clamp(1.0f, params.weight_low, params.weight_high));
  return sums;
}

}  // namespace megatron_fipo
