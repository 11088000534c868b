// Longest-processing-time-first into packs, packs to replicas, then exchanges of single sequences that shorten the
// slowest replica. Everything breaks ties by index, so that all ranks find the same plan.
#include "host/packing.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_fipo {
namespace {

// A plan's ratio is its step time over that of the same cost spread evenly over as many micro-batches.
constexpr double kLevel = 1.001;       // a plan this close is levelled no further
constexpr double kAcceptable = 1.01;   // to one this close, plans with more micro-batches are not tried
constexpr double kWorthwhile = 0.01;   // more micro-batches have to lower the ratio by this much
constexpr int kTries = 3;              // plans with more and more micro-batches
constexpr int64_t kComparisons = 200;  // of two sequences, per sequence, while levelling: a bound on the time

struct Sequence {
  int64_t index, tokens;
  double cost;
};

struct Pack {
  std::vector<Sequence> sequences;
  int64_t tokens = 0;
  double cost = 0;

  void sum_up() {
    tokens = 0;
    cost = 0;
    for (const Sequence& s : sequences) {
      tokens += s.tokens;
      cost += s.cost;
    }
  }
};

using Replica = std::vector<Pack>;

double total_cost(const Replica& replica) {
  double sum = 0;
  for (const Pack& pack : replica) sum += pack.cost;
  return sum;
}

bool cheaper(const Pack& a, const Pack& b) { return a.cost < b.cost; }

const Pack& costliest(const Replica& replica) { return *std::max_element(replica.begin(), replica.end(), cheaper); }

// Packs pass through `stages` equal stages one after the other: the last one leaves when all of them have passed one
// stage and the costliest has passed the others as well. In units of all stages: sum + (stages - 1) * maximum.
double step_time(const Replica& replica, int64_t stages) {
  return total_cost(replica) + static_cast<double>(stages - 1) * costliest(replica).cost;
}

std::vector<Sequence> longest_first(const std::vector<int64_t>& lengths, int64_t begin, int64_t end,
                                    const SequenceCost& cost, int64_t alignment) {
  std::vector<Sequence> sequences;
  sequences.reserve(end - begin);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tokens = (lengths[i] + alignment - 1) / alignment * alignment;
    const double n = static_cast<double>(tokens);
    sequences.push_back({i, tokens, cost.linear * n + cost.quadratic * n * n});
  }
  std::sort(sequences.begin(), sequences.end(), [](const Sequence& a, const Sequence& b) {
    return std::pair(-a.tokens, a.index) < std::pair(-b.tokens, b.index);
  });
  return sequences;
}

// Each sequence, longest first, to the cheapest pack that has room. Returns no packs if one finds no room.
std::vector<Pack> fill(const std::vector<Sequence>& longest_first, size_t count, int64_t max_tokens) {
  using ByCost = std::pair<double, size_t>;   // cost, pack
  using ByRoom = std::pair<int64_t, size_t>;  // room in tokens, pack
  std::vector<Pack> packs(count);
  std::priority_queue<ByCost, std::vector<ByCost>, std::greater<ByCost>> cheapest;
  std::priority_queue<ByRoom> full;  // had no room when they were the cheapest, but may have for a shorter sequence
  for (size_t k = 0; k < count; ++k) cheapest.push({0, k});
  for (const Sequence& s : longest_first) {
    while (!full.empty() && full.top().first >= s.tokens) {
      cheapest.push({packs[full.top().second].cost, full.top().second});
      full.pop();
    }
    while (!cheapest.empty()) {
      const size_t k = cheapest.top().second;
      if (packs[k].sequences.empty() || packs[k].tokens + s.tokens <= max_tokens) break;
      full.push({max_tokens - packs[k].tokens, k});
      cheapest.pop();
    }
    if (cheapest.empty()) return {};
    const size_t k = cheapest.top().second;
    cheapest.pop();
    packs[k].sequences.push_back(s);
    packs[k].tokens += s.tokens;
    packs[k].cost += s.cost;
    cheapest.push({packs[k].cost, k});
  }
  return packs;
}

// Costliest packs first, one to each replica in a round, the costliest of a round to the replica with the least so far.
std::vector<Replica> deal(std::vector<Pack> packs, size_t replicas) {
  std::stable_sort(packs.rbegin(), packs.rend(), cheaper);
  std::vector<Replica> dealt(replicas);
  std::vector<std::pair<double, size_t>> load(replicas);
  for (size_t r = 0; r < replicas; ++r) load[r] = {0, r};
  for (size_t start = 0; start < packs.size(); start += replicas) {
    std::sort(load.begin(), load.end());
    for (size_t k = 0; k < replicas; ++k) {
      load[k].first += packs[start + k].cost;
      dealt[load[k].second].push_back(std::move(packs[start + k]));
    }
  }
  return dealt;
}

constexpr size_t kNone = std::numeric_limits<size_t>::max();

// For each pack, the cost of the costliest of the others.
std::vector<double> costliest_other(const Replica& replica) {
  double first = 0, second = 0;
  for (const Pack& pack : replica) {
    second = std::max(second, std::min(first, pack.cost));
    first = std::max(first, pack.cost);
  }
  std::vector<double> others;
  for (const Pack& pack : replica) others.push_back(pack.cost == first ? second : first);
  return others;
}

// Sequence `give` of one pack for sequence `take` of another (kNone: for nothing).
struct Exchange {
  double time = std::numeric_limits<double>::infinity();  // of the slower of the two replicas afterwards
  size_t from_pack = 0, to_pack = 0, give = 0, take = kNone;
};

class Leveller {
 public:
  Leveller(std::vector<Replica>& replicas, const PackingRules& rules, int64_t comparisons)
      : replicas_(replicas), rules_(rules), comparisons_left_(comparisons) {}

  // Shortens the slowest replica until it takes `goal`, nothing helps, or the comparisons are used up.
  void run(double goal) {
    const size_t count = replicas_.size();
    std::vector<std::pair<double, size_t>> times(count);
    while (comparisons_left_ > 0) {
      for (size_t r = 0; r < count; ++r) times[r] = {step_time(replicas_[r], rules_.pipeline_stages), r};
      std::sort(times.begin(), times.end());
      const auto [slowest_time, slowest] = times.back();
      if (slowest_time <= goal) return;
      bool shorter = false;
      for (size_t k = 0; k < count && !shorter; ++k) {  // the fastest first, the slowest itself last
        const Exchange best = best_exchange(slowest, times[k].second);
        shorter = best.time < slowest_time * (1 - 1e-9);
        if (shorter) apply(best, slowest, times[k].second);
      }
      if (!shorter) return;
    }
  }

 private:
  // The one after which the slower of the two takes least; both may be the same replica.
  Exchange best_exchange(size_t from, size_t to) {
    Exchange best;
    const Replica &a = replicas_[from], &b = replicas_[to];
    const bool same = from == to;
    const double a_sum = total_cost(a), b_sum = total_cost(b);
    const double bubble = static_cast<double>(rules_.pipeline_stages - 1);
    const std::vector<double> a_others = costliest_other(a), b_others = costliest_other(b);
    for (size_t i = 0; i < a.size(); ++i) {
      for (size_t j = 0; j < b.size(); ++j) {
        if (same && a[i].cost <= b[j].cost) continue;
        for (size_t give = 0; give < a[i].sequences.size(); ++give) {
          for (size_t n = 0; n <= b[j].sequences.size(); ++n) {  // the last one: nothing
            --comparisons_left_;
            const bool swap = n < b[j].sequences.size();
            const Sequence taken = swap ? b[j].sequences[n] : Sequence{0, 0, 0};
            const double delta = a[i].sequences[give].cost - taken.cost;
            if (delta <= 0) continue;
            const double a_most = std::max(a_others[i], a[i].cost - delta), b_cost = b[j].cost + delta;
            const double time = same ? a_sum + bubble * std::max(a_most, b_cost)
                                     : std::max(a_sum - delta + bubble * a_most,
                                                b_sum + delta + bubble * std::max(b_others[j], b_cost));
            const size_t take = swap ? n : kNone;
            if (time < best.time && fits(a[i], b[j], give, take)) best = {time, i, j, give, take};
          }
        }
      }
    }
    return best;
  }

  // Whether the budget holds afterwards. A pack may become empty only in exchange for one that was.
  bool fits(const Pack& a, const Pack& b, size_t give, size_t take) const {
    const int64_t b_tokens = b.tokens + a.sequences[give].tokens - (take == kNone ? 0 : b.sequences[take].tokens);
    const size_t b_count = b.sequences.size() + (take == kNone ? 1 : 0);
    if (take == kNone && a.sequences.size() == 1 && b_count > 1) return false;
    return b_count == 1 || b_tokens <= rules_.max_tokens;
  }

  void apply(const Exchange& exchange, size_t from, size_t to) {
    Pack &a = replicas_[from][exchange.from_pack], &b = replicas_[to][exchange.to_pack];
    if (exchange.take == kNone) {
      b.sequences.push_back(a.sequences[exchange.give]);
      a.sequences.erase(a.sequences.begin() + exchange.give);
    } else {
      std::swap(a.sequences[exchange.give], b.sequences[exchange.take]);
    }
    a.sum_up();
    b.sum_up();
  }

  std::vector<Replica>& replicas_;
  const PackingRules& rules_;
  int64_t comparisons_left_;
};

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check(const std::vector<int64_t>& lengths, int64_t begin, int64_t end, const SequenceCost& cost,
           const PackingRules& rules) {
  const auto require = [](bool holds, const char* name, auto value, const char* condition) {
    if (!holds) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", not " + condition);
  };
  require(rules.replicas >= 1, "replicas", rules.replicas, "at least 1");
  require(rules.pipeline_stages >= 1, "pipeline_stages", rules.pipeline_stages, "at least 1");
  require(rules.max_tokens >= 1, "max_tokens", rules.max_tokens, "at least 1");
  require(rules.alignment >= 1, "alignment", rules.alignment, "at least 1");
  require(rules.micro_batch_multiple >= 1, "micro_batch_multiple", rules.micro_batch_multiple, "at least 1");
  require(cost.linear > 0, "cost.linear", cost.linear, "positive");
  require(cost.quadratic >= 0, "cost.quadratic", cost.quadratic, "at least 0");
  for (int64_t i = begin; i < end; ++i)
    if (lengths[i] < 1)
      throw std::invalid_argument("lengths_S[" + std::to_string(i) + "] is " + std::to_string(lengths[i]) +
                                  ", not at least 1");
}

struct Plan {
  std::vector<Replica> replicas;
  double ratio = std::numeric_limits<double>::infinity();  // step time over that of an even spread, see above
  bool bound_by_one_sequence = false;                      // no number of micro-batches makes the step shorter
};

// A plan of `count` micro-batches per replica; without replicas if that is too few for the budget.
Plan plan(const std::vector<Sequence>& longest_first, const PackingRules& rules, int64_t count) {
  std::vector<Pack> packs = fill(longest_first, count * rules.replicas, rules.max_tokens);
  if (packs.empty()) return {};
  double even = 0;
  for (const Pack& pack : packs) even += pack.cost;
  even *= static_cast<double>(count + rules.pipeline_stages - 1) / static_cast<double>(count * rules.replicas);
  std::vector<Replica> replicas = deal(std::move(packs), rules.replicas);
  Leveller(replicas, rules, kComparisons * static_cast<int64_t>(longest_first.size())).run(even * kLevel);
  const auto time = [&](const Replica& replica) { return step_time(replica, rules.pipeline_stages); };
  const Replica& slowest = *std::max_element(replicas.begin(), replicas.end(),
                                             [&](const Replica& a, const Replica& b) { return time(a) < time(b); });
  const double ratio = time(slowest) / even;
  const bool one_sequence = costliest(slowest).sequences.size() == 1;
  return {std::move(replicas), ratio, one_sequence};
}

std::vector<int64_t> indices(const Pack& pack) {
  std::vector<int64_t> result;
  for (const Sequence& s : pack.sequences) result.push_back(s.index);
  std::sort(result.begin(), result.end());
  return result;
}

}  // namespace

Packs pack_sequences(const std::vector<int64_t>& lengths, int64_t begin, int64_t end, const SequenceCost& cost,
                     const PackingRules& rules) {
  check(lengths, begin, end, cost, rules);
  const std::vector<Sequence> sequences = longest_first(lengths, begin, end, cost, rules.alignment);
  const auto rounded = [&](int64_t count) {
    return std::max<int64_t>(1, ceil_divide(count, rules.micro_batch_multiple)) * rules.micro_batch_multiple;
  };
  int64_t alone = 0, shared_tokens = 0;  // sequences that leave no room in a pack; tokens of the others
  for (const Sequence& s : sequences) {
    if (s.tokens >= rules.max_tokens)
      ++alone;
    else
      shared_tokens += s.tokens;
  }
  const int64_t fewest = rounded(ceil_divide(alone + ceil_divide(shared_tokens, rules.max_tokens), rules.replicas));
  const int64_t most = rounded(ceil_divide(end - begin, rules.replicas));  // every sequence may have a pack of its own

  Plan best;
  int tries = 0;
  for (int64_t count = fewest;; count = std::min(most, rounded(count + std::max<int64_t>(1, count / 32)))) {
    Plan next = plan(sequences, rules, count);
    const bool bound = next.bound_by_one_sequence;
    if (!next.replicas.empty()) ++tries;
    if (next.ratio < best.ratio - kWorthwhile) best = std::move(next);
    if (best.ratio <= kAcceptable || bound || tries == kTries || count == most) break;
  }

  Packs result(rules.replicas);
  for (int64_t r = 0; r < rules.replicas; ++r) {
    std::stable_sort(best.replicas[r].rbegin(), best.replicas[r].rend(), cheaper);
    for (const Pack& pack : best.replicas[r]) result[r].push_back(indices(pack));
  }
  return result;
}

}  // namespace megatron_fipo
