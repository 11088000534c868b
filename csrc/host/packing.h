// Sequences of one update to replicas and micro-batches by modelled cost. The contract stands in
// megatron_fipo/data/planning.py. No Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_fipo {

// What the plan has to keep. All values are at least 1.
struct PackingRules {
  int64_t replicas;
  int64_t pipeline_stages;
  int64_t max_tokens;            // of a pack with more than one sequence
  int64_t alignment;             // a sequence takes a multiple of so many tokens
  int64_t micro_batch_multiple;  // a replica's number of packs is a multiple of this
};

// Cost of a sequence of n tokens: linear * n + quadratic * n * n. The unit does not matter.
struct SequenceCost {
  double linear, quadratic;
};

// [replica][micro-batch][sequence]: indices into `lengths`, ascending in a pack. A replica's packs run from the
// costliest to the cheapest; an empty one holds its place where there are fewer sequences than packs.
using Packs = std::vector<std::vector<std::vector<int64_t>>>;

// Packs of the sequences [begin, end) of `lengths`, at least one. Throws std::invalid_argument naming the value that
// makes no sense. Depends on its arguments only.
Packs pack_sequences(const std::vector<int64_t>& lengths, int64_t begin, int64_t end, const SequenceCost& cost,
                     const PackingRules& rules);

}  // namespace megatron_fipo
