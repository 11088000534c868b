#include "cpu/packed.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"

namespace megatron_fipo {
namespace {

constexpr int64_t kBlock = 16384;               // tokens of a work item, about
constexpr int64_t kWholeSequence = 2 * kBlock;  // up to here a sequence is one block
constexpr int64_t kTokensPerThread = 8192;      // a thread is not worth waking for less

// One block of a sequence. starts_scan: the first of its sequence in scan order.
struct Block {
  Run run;
  bool starts_scan;
};

// The blocks in scan order, so that the block which hands its carry to blocks[i] is blocks[i - 1], and the work items:
// item i is the blocks from items[i] to items[i + 1].
struct Plan {
  std::vector<Block> blocks;
  std::vector<size_t> items = {0};
  int64_t num_tokens = 0;
  bool has_cut_sequences = false;
  int64_t num_items() const { return static_cast<int64_t>(items.size()) - 1; }
};

Plan make_plan(const std::vector<int64_t>& offsets, bool reverse) {
  Plan plan;
  plan.blocks.reserve(offsets.size() + offsets.back() / kBlock);
  int64_t in_item = 0;
  const auto close_item = [&] {
    if (plan.items.back() != plan.blocks.size()) plan.items.push_back(plan.blocks.size());
    in_item = 0;
  };
  const int64_t num_sequences = static_cast<int64_t>(offsets.size()) - 1;
  for (int64_t i = 0; i < num_sequences; ++i) {
    const int64_t s = reverse ? num_sequences - 1 - i : i;   // the whole pack in scan order: one stream through memory
    const int64_t begin = offsets[s], end = offsets[s + 1], size = end - begin;
    const int64_t step = size <= kWholeSequence ? size : kBlock;
    plan.has_cut_sequences |= step < size;
    for (int64_t done = 0; done < size; done += step) {
      const int64_t count = std::min(step, size - done);
      const int64_t at = reverse ? end - done - count : begin + done;
      plan.blocks.push_back({{at, at + count, s}, done == 0});
      in_item += count;
      if (in_item >= kBlock) close_item();
    }
  }
  close_item();
  plan.num_tokens = offsets.back();
  return plan;
}

// Runs body(item) for every item, in contiguous pieces.
template <class Body>
void for_each_item(const Plan& plan, const Parallel& parallel, const Body& body) {
  const int64_t items = plan.num_items();
  const int64_t pieces = std::min(items, std::min(plan.num_tokens / kTokensPerThread, parallel.threads));
  const auto run_pieces = [&](int64_t first, int64_t last) {
    for (int64_t item = items * first / pieces; item < items * last / pieces; ++item) body(item);
  };
  if (pieces > 1)
    parallel.run(pieces, run_pieces);
  else
    for (int64_t item = 0; item < items; ++item) body(item);
}

template <class Body>
void for_each_block(const Plan& plan, const Parallel& parallel, const Body& body) {
  for_each_item(plan, parallel, [&](int64_t item) {
    for (size_t i = plan.items[item]; i < plan.items[item + 1]; ++i) body(i);
  });
}

// The carry into every block. aggregate(run) is the run's own carry out when nothing comes in.
template <class Aggregate>
std::vector<double> carries(const Plan& plan, double gamma, const double* carry, const Parallel& parallel,
                            const Aggregate& aggregate) {
  const std::vector<Block>& blocks = plan.blocks;
  std::vector<double> own, in(blocks.size(), 0.0);
  if (plan.has_cut_sequences) {
    own.resize(blocks.size());
    for_each_block(plan, parallel, [&](size_t i) {
      if (i + 1 < blocks.size() && !blocks[i + 1].starts_scan) own[i] = aggregate(blocks[i].run);
    });
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i].starts_scan)
      in[i] = carry ? carry[blocks[i].run.sequence] : 0.0;
    else
      in[i] = own[i - 1] + std::pow(gamma, static_cast<double>(blocks[i - 1].run.size())) * in[i - 1];
  }
  return in;
}

// Stores that go past the caches save reading the lines that they replace. They pay once the outputs would push everything
// else out, and need whole aligned registers. (What the system reports as cache size may be the whole socket's.)
constexpr int64_t kStreamedBytes = int64_t{24} << 20;
bool streams(int64_t output_bytes, std::initializer_list<const float*> outputs) {
  return output_bytes > kStreamedBytes && std::all_of(outputs.begin(), outputs.end(), [](const float* p) {
           return reinterpret_cast<uintptr_t>(p) % 64 == 0;
         });
}

// The single-use sums of a work item's lanes.
Statistics finish(const LaneStatistics& lanes, const FipoParams& params) {
  const auto total = [](const double(&values)[kMaxLanes]) {
    double all = 0.0;
    for (double value : values) all += value;
    return all;
  };
  Statistics result;
  for (int i = 0; i < sum::count; ++i) result.sums[i] = static_cast<double>(lanes.counts[i]);
  result.sums[sum::log_ratio] = total(lanes.log_ratio);
  result.sums[sum::weight] = total(lanes.weight);
  result.sums[sum::raw_weight] = total(lanes.raw_weight);
  if (params.weight_low == kUnclippedLow && params.weight_high == kUnclippedHigh)
    result.sums[sum::weight_at_high] = result.sums[sum::weight_at_low] = 0.0;

  const auto low = [](const LaneStatistics::Range& range) { return *std::min_element(range.low, range.low + kMaxLanes); };
  const auto high = [](const LaneStatistics::Range& range) { return *std::max_element(range.high, range.high + kMaxLanes); };
  const auto raw_weight = [](float future_kl) {   // infinities, of no tokens, stay
    return std::isinf(future_kl) ? future_kl : std::exp(std::clamp(future_kl, -kMaxFutureKl, kMaxFutureKl));
  };
  const auto weight = [&](float future_kl) {
    return std::isinf(future_kl) ? future_kl : std::clamp(raw_weight(future_kl), params.weight_low, params.weight_high);
  };
  result.minima[extremum::weight] = std::min(weight(low(lanes.future_kl)), low(lanes.safe_weight));
  result.maxima[extremum::weight] = std::max(weight(high(lanes.future_kl)), high(lanes.safe_weight));
  result.minima[extremum::raw_weight] = raw_weight(std::min(low(lanes.future_kl), low(lanes.safe_future_kl)));
  result.maxima[extremum::raw_weight] = raw_weight(std::max(high(lanes.future_kl), high(lanes.safe_future_kl)));
  result.minima[extremum::negative_log_ratio] = low(lanes.negative_log_ratio);
  result.maxima[extremum::negative_log_ratio] = high(lanes.negative_log_ratio);
  result.minima[extremum::positive_log_ratio] = low(lanes.positive_log_ratio);
  result.maxima[extremum::positive_log_ratio] = high(lanes.positive_log_ratio);
  return result;
}

void merge(Statistics& total, const Statistics& other) {
  for (int i = 0; i < sum::count; ++i) total.sums[i] += other.sums[i];
  for (int i = 0; i < extremum::count; ++i) {
    total.minima[i] = std::min(total.minima[i], other.minima[i]);
    total.maxima[i] = std::max(total.maxima[i], other.maxima[i]);
  }
}

}  // namespace

void packed_scan(const float* x, float* y, const std::vector<int64_t>& offsets, int64_t num_tokens, double gamma,
                 bool reverse, const double* carry, const Parallel& parallel) {
  const auto scan = reverse ? kernels().scan_reverse : kernels().scan_forward;
  const Plan plan = make_plan(offsets, reverse);
  const Discount discount(gamma);
  const bool streaming = x != y && streams(num_tokens * sizeof(float), {y});
  const std::vector<double> in = carries(plan, gamma, carry, parallel, [&](const Run& run) {
    return scan(x, nullptr, run, discount, 0.0, false);
  });
  for_each_block(plan, parallel, [&](size_t i) { scan(x, y, plan.blocks[i].run, discount, in[i], streaming); });
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

LossSums packed_fipo_loss(const TokenInput& in, const TokenOutput& out, const std::vector<int64_t>& offsets,
                          int64_t num_tokens, const FipoParams& params, const double* carry, const Parallel& parallel) {
  const Plan plan = make_plan(offsets, /*reverse=*/true);
  const Discount discount(params.gamma);
  const bool streaming = streams(2 * num_tokens * sizeof(float), {out.grad, out.weight});
  const std::vector<double> carry_in = carries(plan, params.gamma, carry, parallel, [&](const Run& run) {
    int64_t beyond_c = 0;
    return kernels().future_kl_aggregate(in, run, params, discount, beyond_c);
  });
  std::vector<SequenceSums> block_sums(plan.blocks.size());
  std::vector<Statistics> item_statistics(plan.num_items());
  for_each_item(plan, parallel, [&](int64_t item) {
    LaneStatistics lanes;
    for (size_t i = plan.items[item]; i < plan.items[item + 1]; ++i)
      kernels().fipo_loss(in, plan.blocks[i].run, params, discount, carry_in[i], out, streaming, block_sums[i], lanes);
    item_statistics[item] = finish(lanes, params);
  });
  LossSums sums = {std::vector<SequenceSums>(offsets.size() - 1), finish(LaneStatistics(), params)};
  for (size_t i = 0; i < plan.blocks.size(); ++i) {
    SequenceSums& total = sums.sequences[plan.blocks[i].run.sequence];
    total.loss += block_sums[i].loss;
    total.tokens += block_sums[i].tokens;
    total.dual_clipped += block_sums[i].dual_clipped;
  }
  for (const Statistics& statistics : item_statistics) merge(sums.statistics, statistics);
  const int64_t used = offsets.back();
  std::fill(out.grad + used, out.grad + num_tokens, 0.0f);
  std::fill(out.weight + used, out.weight + num_tokens, std::clamp(1.0f, params.weight_low, params.weight_high));
  return sums;
}

std::vector<Aggregate> packed_future_kl_aggregate(const TokenInput& in, const std::vector<int64_t>& offsets,
                                                  const FipoParams& params, const Parallel& parallel) {
  const Plan plan = make_plan(offsets, /*reverse=*/true);
  const Discount discount(params.gamma);
  std::vector<Aggregate> own(plan.blocks.size()), sequences(offsets.size() - 1);
  for_each_block(plan, parallel, [&](size_t i) {
    own[i].future_kl =
        kernels().future_kl_aggregate(in, plan.blocks[i].run, params, discount, own[i].beyond_c);
  });
  for (size_t i = 0; i < plan.blocks.size(); ++i) {
    const Run& run = plan.blocks[i].run;
    Aggregate& total = sequences[run.sequence];
    total.future_kl = own[i].future_kl + std::pow(params.gamma, static_cast<double>(run.size())) * total.future_kl;
    total.beyond_c += own[i].beyond_c;
  }
  return sequences;
}

void packed_scale(const float* x, const double* scale, float* y, const std::vector<int64_t>& offsets,
                  int64_t num_tokens, const Parallel& parallel) {
  const Plan plan = make_plan(offsets, /*reverse=*/false);
  const bool streaming = streams(num_tokens * sizeof(float), {y});
  for_each_block(plan, parallel, [&](size_t i) {
    const Run& run = plan.blocks[i].run;
    kernels().scale(x, y, run, static_cast<float>(scale[run.sequence]), streaming);
  });
  std::fill(y + offsets.back(), y + num_tokens, 0.0f);
}

}  // namespace megatron_fipo
