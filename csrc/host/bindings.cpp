// Python's view of the packing (see megatron_fipo/data/planning.py).
#include "host/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/packing.h"

namespace py = pybind11;

namespace megatron_fipo {
namespace {

template <class Items, class Convert>
py::tuple as_tuple(const Items& items, const Convert& convert) {
  py::tuple result(items.size());
  for (size_t i = 0; i < items.size(); ++i) result[i] = convert(items[i]);
  return result;
}

py::tuple pack_step(const std::vector<int64_t>& lengths, int64_t samples_per_update, double linear, double quadratic,
                    int64_t replicas, int64_t pipeline_stages, int64_t max_tokens, int64_t alignment,
                    int64_t micro_batch_multiple) {
  if (samples_per_update < 1)
    throw std::invalid_argument("samples_per_update is " + std::to_string(samples_per_update) + ", not at least 1");
  const PackingRules rules = {replicas, pipeline_stages, max_tokens, alignment, micro_batch_multiple};
  const int64_t count = static_cast<int64_t>(lengths.size());
  std::vector<Packs> updates;
  for (int64_t begin = 0; begin < count; begin += std::min(samples_per_update, count - begin))
    updates.push_back(pack_sequences(lengths, begin, begin + std::min(samples_per_update, count - begin),
                                     {linear, quadratic}, rules));
  const auto number = [](int64_t index) { return py::int_(index); };
  const auto micro_batch = [&](const auto& pack) { return as_tuple(pack, number); };
  const auto replica = [&](const auto& packs) { return as_tuple(packs, micro_batch); };
  return as_tuple(updates, [&](const auto& update) { return as_tuple(update, replica); });
}

}  // namespace

void bind_packing(py::module_& module) {
  using namespace py::literals;
  module.def("pack_step", &pack_step, "lengths"_a, "samples_per_update"_a, py::kw_only(), "linear"_a, "quadratic"_a,
             "replicas"_a, "pipeline_stages"_a, "max_tokens"_a, "alignment"_a, "micro_batch_multiple"_a,
             "[update][replica][micro-batch][sequence] as tuples of indices into lengths; see data/planning.py. "
             "Raises ValueError.");
}

}  // namespace megatron_fipo
