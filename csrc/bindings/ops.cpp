// Tensor operators on LibTorch's stable ABI: one binary for torch 2.10 and later, loaded without Python.
// Fake kernels and autograd formulas stand in megatron_fipo/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "cpu/packed.h"

namespace {

using megatron_fipo::check_vector;
using megatron_fipo::fipo_params;
using megatron_fipo::FipoParams;
using megatron_fipo::floats;
using megatron_fipo::Parallel;
using megatron_fipo::TokenInput;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
std::vector<int64_t> copy(const Tensor& t) {
  const T* data = static_cast<const T*>(t.const_data_ptr());
  return std::vector<int64_t>(data, data + t.numel());
}

// The kernels index memory by these numbers, so they are checked here whatever the caller did.
std::vector<int64_t> token_offsets(const Tensor& cu_seqlens, int64_t num_tokens) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.is_contiguous() && cu_seqlens.numel() > 0,
                  "cu_seqlens must be a contiguous, non-empty vector");
  const ScalarType dtype = cu_seqlens.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "cu_seqlens must be int32 or int64");
  std::vector<int64_t> offsets = dtype == ScalarType::Int ? copy<int32_t>(cu_seqlens) : copy<int64_t>(cu_seqlens);
  STD_TORCH_CHECK(offsets.front() == 0, "cu_seqlens must start at 0, not ", offsets.front());
  for (size_t s = 1; s < offsets.size(); ++s)
    STD_TORCH_CHECK(offsets[s - 1] <= offsets[s], "cu_seqlens must not decrease, but does at index ", s);
  STD_TORCH_CHECK(offsets.back() <= num_tokens, "cu_seqlens ends at ", offsets.back(), " with ", num_tokens, " tokens");
  return offsets;
}

const double* carry_pointer(const std::optional<Tensor>& carry, const std::vector<int64_t>& offsets) {
  if (!carry) return nullptr;
  check_vector(*carry, "carry", ScalarType::Double, static_cast<int64_t>(offsets.size()) - 1);
  return static_cast<const double*>(carry->const_data_ptr());
}

Parallel torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
            torch::stable::parallel_for(0, n, 1, body);
          }};
}

void discounted_scan_out(const Tensor& x, const Tensor& cu_seqlens, double gamma, bool reverse,
                         const std::optional<Tensor>& carry, Tensor out) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "x must be float32 or float64");
  const int64_t num_tokens = x.numel();
  check_vector(x, "x", x.scalar_type(), num_tokens);
  check_vector(out, "out", x.scalar_type(), num_tokens);
  const std::vector<int64_t> offsets = token_offsets(cu_seqlens, num_tokens);
  const double* carry_data = carry_pointer(carry, offsets);
  if (x.scalar_type() == ScalarType::Float)
    megatron_fipo::packed_scan(static_cast<const float*>(x.const_data_ptr()),
                               static_cast<float*>(out.mutable_data_ptr()), offsets, num_tokens, gamma, reverse,
                               carry_data, torch_threads());
  else
    megatron_fipo::packed_scan(static_cast<const double*>(x.const_data_ptr()),
                               static_cast<double*>(out.mutable_data_ptr()), offsets, num_tokens, gamma, reverse,
                               carry_data, torch_threads());
}

Tensor discounted_scan(const Tensor& x, const Tensor& cu_seqlens, double gamma, bool reverse,
                       const std::optional<Tensor>& carry) {
  Tensor out = torch::stable::empty_like(x);
  discounted_scan_out(x, cu_seqlens, gamma, reverse, carry, out);
  return out;
}

TokenInput token_input(const Tensor& logp, const Tensor& old_logp, const Tensor& advantage, const Tensor& response_mask,
                       const std::optional<Tensor>& token_weight, bool advantage_is_per_token, int64_t num_sequences) {
  const int64_t num_tokens = logp.numel();
  check_vector(logp, "logp", ScalarType::Float, num_tokens);
  check_vector(old_logp, "old_logp", ScalarType::Float, num_tokens);
  check_vector(advantage, "advantage", ScalarType::Float, advantage_is_per_token ? num_tokens : num_sequences);
  check_vector(response_mask, "response_mask", ScalarType::Bool, num_tokens);
  if (token_weight) check_vector(*token_weight, "token_weight", ScalarType::Float, num_tokens);
  return {floats(logp),
          floats(old_logp),
          static_cast<const uint8_t*>(response_mask.const_data_ptr()),
          floats(advantage),
          advantage_is_per_token,
          token_weight ? floats(*token_weight) : nullptr};
}

std::tuple<Tensor, Tensor, Tensor> fipo_loss_out(
    const Tensor& logp, const Tensor& old_logp, const Tensor& advantage, const Tensor& response_mask,
    const Tensor& cu_seqlens, const std::optional<Tensor>& token_weight, const std::optional<Tensor>& carry,
    bool advantage_is_per_token, double gamma, double weight_low, double weight_high, double safety_threshold,
    double dual_clip, double clip_low, double clip_high, bool paper, Tensor grad, Tensor weight) {
  const int64_t num_tokens = logp.numel();
  const std::vector<int64_t> offsets = token_offsets(cu_seqlens, num_tokens);
  const int64_t num_sequences = static_cast<int64_t>(offsets.size()) - 1;
  const TokenInput in =
      token_input(logp, old_logp, advantage, response_mask, token_weight, advantage_is_per_token, num_sequences);
  const FipoParams params =
      fipo_params(gamma, weight_low, weight_high, safety_threshold, dual_clip, clip_low, clip_high, paper);
  check_vector(grad, "grad", ScalarType::Float, num_tokens);
  check_vector(weight, "weight", ScalarType::Float, num_tokens);

  const megatron_fipo::LossSums sums = megatron_fipo::packed_fipo_loss(
      in, {static_cast<float*>(grad.mutable_data_ptr()), static_cast<float*>(weight.mutable_data_ptr())}, offsets,
      num_tokens, params, carry_pointer(carry, offsets), torch_threads());

  Tensor loss = torch::stable::new_empty(logp, {num_sequences}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(logp, {num_sequences, 2}, ScalarType::Long);
  Tensor statistics = torch::stable::new_empty(logp, {megatron_fipo::kNumStatistics}, ScalarType::Double);
  double* loss_data = static_cast<double*>(loss.mutable_data_ptr());
  int64_t* counts_data = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (int64_t s = 0; s < num_sequences; ++s) {
    loss_data[s] = sums.sequences[s].loss;
    counts_data[2 * s] = sums.sequences[s].tokens;
    counts_data[2 * s + 1] = sums.sequences[s].dual_clipped;
  }
  std::memcpy(statistics.mutable_data_ptr(), &sums.statistics, sizeof(sums.statistics));
  return {loss, counts, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fipo_loss(
    const Tensor& logp, const Tensor& old_logp, const Tensor& advantage, const Tensor& response_mask,
    const Tensor& cu_seqlens, const std::optional<Tensor>& token_weight, const std::optional<Tensor>& carry,
    bool advantage_is_per_token, double gamma, double weight_low, double weight_high, double safety_threshold,
    double dual_clip, double clip_low, double clip_high, bool paper) {
  Tensor grad = torch::stable::empty_like(logp);
  Tensor weight = torch::stable::empty_like(logp);
  const auto [loss, counts, statistics] =
      fipo_loss_out(logp, old_logp, advantage, response_mask, cu_seqlens, token_weight, carry, advantage_is_per_token,
                    gamma, weight_low, weight_high, safety_threshold, dual_clip, clip_low, clip_high, paper, grad,
                    weight);
  return {loss, counts, grad, weight, statistics};
}

std::tuple<Tensor, Tensor> future_kl_aggregate(const Tensor& logp, const Tensor& old_logp, const Tensor& advantage,
                                               const Tensor& response_mask, const Tensor& cu_seqlens,
                                               bool advantage_is_per_token, double gamma, double dual_clip,
                                               double clip_low, double clip_high) {
  const std::vector<int64_t> offsets = token_offsets(cu_seqlens, logp.numel());
  const int64_t num_sequences = static_cast<int64_t>(offsets.size()) - 1;
  const TokenInput in =
      token_input(logp, old_logp, advantage, response_mask, {}, advantage_is_per_token, num_sequences);
  const FipoParams params = fipo_params(gamma, 0, 0, 0, dual_clip, clip_low, clip_high, false);
  const std::vector<megatron_fipo::Aggregate> sequences =
      megatron_fipo::packed_future_kl_aggregate(in, offsets, params, torch_threads());
  Tensor aggregate = torch::stable::new_empty(logp, {num_sequences}, ScalarType::Float);
  Tensor beyond_c = torch::stable::new_empty(logp, {num_sequences}, ScalarType::Int);
  for (int64_t s = 0; s < num_sequences; ++s) {
    static_cast<float*>(aggregate.mutable_data_ptr())[s] = static_cast<float>(sequences[s].future_kl);
    static_cast<int32_t*>(beyond_c.mutable_data_ptr())[s] = static_cast<int32_t>(sequences[s].beyond_c);
  }
  return {aggregate, beyond_c};
}

Tensor scale_per_sequence(const Tensor& values, const Tensor& scale, const Tensor& cu_seqlens) {
  const int64_t num_tokens = values.numel();
  check_vector(values, "values", ScalarType::Float, num_tokens);
  const std::vector<int64_t> offsets = token_offsets(cu_seqlens, num_tokens);
  check_vector(scale, "scale", ScalarType::Double, static_cast<int64_t>(offsets.size()) - 1);
  Tensor out = torch::stable::empty_like(values);
  megatron_fipo::packed_scale(floats(values), static_cast<const double*>(scale.const_data_ptr()),
                              static_cast<float*>(out.mutable_data_ptr()), offsets, num_tokens, torch_threads());
  return out;
}

}  // namespace

// clang-format off
#define FIPO_LOSS_ARGUMENTS \
  "Tensor logp, Tensor old_logp, Tensor advantage, Tensor response_mask, Tensor cu_seqlens, Tensor? token_weight, " \
  "Tensor? carry, bool advantage_is_per_token, float gamma, float weight_low, float weight_high, " \
  "float safety_threshold, float dual_clip, float clip_low, float clip_high, bool paper"
// clang-format on

STABLE_TORCH_LIBRARY(megatron_fipo, library) {
  library.def("discounted_scan(Tensor x, Tensor cu_seqlens, float gamma, bool reverse, Tensor? carry) -> Tensor");
  library.def(
      "discounted_scan_out(Tensor x, Tensor cu_seqlens, float gamma, bool reverse, Tensor? carry, Tensor(a!) out) -> ()");
  library.def("fipo_loss(" FIPO_LOSS_ARGUMENTS
              ") -> (Tensor loss_S, Tensor counts_S2, Tensor grad_T, Tensor weight_T, Tensor statistics_K)");
  library.def("fipo_loss_out(" FIPO_LOSS_ARGUMENTS
              ", Tensor(a!) grad, Tensor(b!) weight) -> (Tensor loss_S, Tensor counts_S2, Tensor statistics_K)");
  library.def(
      "future_kl_aggregate(Tensor logp, Tensor old_logp, Tensor advantage, Tensor response_mask, Tensor cu_seqlens, "
      "bool advantage_is_per_token, float gamma, float dual_clip, float clip_low, float clip_high) -> "
      "(Tensor aggregate_S, Tensor beyond_c_S)");
  library.def("scale_per_sequence(Tensor values_T, Tensor scale_S, Tensor cu_seqlens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_fipo, CPU, library) {
  library.impl("discounted_scan", TORCH_BOX(&discounted_scan));
  library.impl("discounted_scan_out", TORCH_BOX(&discounted_scan_out));
  library.impl("fipo_loss", TORCH_BOX(&fipo_loss));
  library.impl("fipo_loss_out", TORCH_BOX(&fipo_loss_out));
  library.impl("future_kl_aggregate", TORCH_BOX(&future_kl_aggregate));
  library.impl("scale_per_sequence", TORCH_BOX(&scale_per_sequence));
}
