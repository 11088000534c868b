// The operators of ops.cpp on CUDA tensors. The schemas stand there. Needs no CUDA header, so it builds against any
// torch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "bindings/arguments.h"
#include "core/statistics.h"
#include "cuda/kernels.h"

// Weak, because a torch without CUDA has no such symbol and must still load this library. setup.py makes the linker
// keep libtorch, behind which a torch with CUDA has it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// For the test that the symbol is found wherever torch has CUDA.
extern "C" __attribute__((visibility("default"))) int megatron_fipo_finds_cuda_stream() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}

namespace {

using megatron_fipo::check_vector;
using megatron_fipo::fipo_params;
using megatron_fipo::floats;
using megatron_fipo::kNumStatistics;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
namespace cuda = megatron_fipo::cuda;

void check(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, what, " failed: ", cuda::describe(error));
}

void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// A workspace for one launch. On each stream launches share one, which grows. A graph that is being captured gets
// memory of its own from its pool, cleared in the graph: a replay may run beside anything.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t tokens, void* stream) {
    bool capturing = false;
    check(cuda::is_capturing(stream, &capturing), "asking whether the stream is being captured");
    if (capturing) {
      memory_.emplace(make(like, tokens, stream));
      view_ = {memory_->mutable_data_ptr(), tokens};
      return;
    }
    // never destroyed: at exit CUDA is gone before static objects are
    static auto& mutex = *new std::mutex;
    static auto& cache = *new std::map<std::pair<int32_t, void*>, std::pair<Tensor, int64_t>>;
    const std::lock_guard<std::mutex> lock(mutex);
    const std::pair<int32_t, void*> key = {like.get_device_index(), stream};
    auto entry = cache.find(key);
    if (entry == cache.end() || entry->second.second < tokens) {
      const int64_t room = std::max<int64_t>(tokens + tokens / 2, 1 << 18);
      entry = cache.insert_or_assign(key, std::make_pair(make(like, room, stream), room)).first;
    }
    view_ = {entry->second.first.mutable_data_ptr(), entry->second.second};
  }

  const cuda::WorkspaceMemory& view() const { return view_; }

 private:
  static Tensor make(const Tensor& like, int64_t tokens, void* stream) {
    const int64_t bytes = static_cast<int64_t>(cuda::workspace_bytes(tokens));
    Tensor memory = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    check(cuda::zero(memory.mutable_data_ptr(), bytes, stream), "clearing the workspace");
    return memory;
  }

  std::optional<Tensor> memory_;
  cuda::WorkspaceMemory view_;
};

void check_device(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name, " must be on the same GPU");
}

void check_vector_on(const Tensor& t, const char* name, ScalarType dtype, int64_t size, const Tensor& like) {
  check_vector(t, name, dtype, size);
  check_device(t, name, like);
}

// Its values stay unread: that would wait for the GPU.
cuda::PackedSequences packed_sequences(const Tensor& cu_seqlens, const Tensor& like) {
  const ScalarType dtype = cu_seqlens.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "cu_seqlens must be int32 or int64");
  check_vector_on(cu_seqlens, "cu_seqlens", dtype, cu_seqlens.numel(), like);
  const int64_t count = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(count >= 0 && count < INT32_MAX, "cu_seqlens has ", count + 1, " elements");
  return {cu_seqlens.const_data_ptr(), dtype == ScalarType::Long, count};
}

const double* carry_pointer(const std::optional<Tensor>& carry, int64_t num_sequences, const Tensor& like) {
  if (!carry) return nullptr;
  check_vector_on(*carry, "carry", ScalarType::Double, num_sequences, like);
  return static_cast<const double*>(carry->const_data_ptr());
}

void discounted_scan_out(const Tensor& x, const Tensor& cu_seqlens, double gamma, bool reverse,
                         const std::optional<Tensor>& carry, Tensor out) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "x must be float32 or float64");
  const int64_t num_tokens = x.numel();
  check_vector(x, "x", dtype, num_tokens);
  check_vector_on(out, "out", dtype, num_tokens, x);
  const cuda::PackedSequences sequences = packed_sequences(cu_seqlens, x);
  const double* carry_data = carry_pointer(carry, sequences.count, x);
  const DeviceGuard guard(x.get_device_index());
  void* stream = current_stream(x.get_device_index());
  if (dtype == ScalarType::Double) {
    check(cuda::discounted_scan(static_cast<const double*>(x.const_data_ptr()),
                                static_cast<double*>(out.mutable_data_ptr()), carry_data, num_tokens, sequences, gamma,
                                reverse, stream),
          "discounted_scan");
    return;
  }
  const Workspace workspace(x, num_tokens, stream);
  check(
      cuda::discounted_scan({floats(x), static_cast<float*>(out.mutable_data_ptr()), carry_data, num_tokens, sequences},
                            gamma, reverse, workspace.view(), stream),
      "discounted_scan");
}

Tensor discounted_scan(const Tensor& x, const Tensor& cu_seqlens, double gamma, bool reverse,
                       const std::optional<Tensor>& carry) {
  Tensor out = torch::stable::empty_like(x);
  discounted_scan_out(x, cu_seqlens, gamma, reverse, carry, out);
  return out;
}

cuda::LossArguments loss_arguments(const Tensor& logp, const Tensor& old_logp, const Tensor& advantage,
                                   const Tensor& response_mask, const Tensor& cu_seqlens,
                                   const std::optional<Tensor>& token_weight, const std::optional<Tensor>& carry,
                                   bool advantage_is_per_token) {
  const ScalarType dtype = logp.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "logp must be float32 or bfloat16");
  const int64_t num_tokens = logp.numel();
  const cuda::PackedSequences sequences = packed_sequences(cu_seqlens, logp);
  check_vector(logp, "logp", dtype, num_tokens);
  check_vector_on(old_logp, "old_logp", dtype, num_tokens, logp);
  check_vector_on(advantage, "advantage", ScalarType::Float, advantage_is_per_token ? num_tokens : sequences.count,
                  logp);
  check_vector_on(response_mask, "response_mask", ScalarType::Bool, num_tokens, logp);
  if (token_weight) check_vector_on(*token_weight, "token_weight", ScalarType::Float, num_tokens, logp);
  return {logp.const_data_ptr(),
          old_logp.const_data_ptr(),
          dtype == ScalarType::BFloat16,
          static_cast<const uint8_t*>(response_mask.const_data_ptr()),
          floats(advantage),
          advantage_is_per_token,
          token_weight ? floats(*token_weight) : nullptr,
          carry_pointer(carry, sequences.count, logp),
          num_tokens,
          sequences};
}

std::tuple<Tensor, Tensor, Tensor> fipo_loss_out(
    const Tensor& logp, const Tensor& old_logp, const Tensor& advantage, const Tensor& response_mask,
    const Tensor& cu_seqlens, const std::optional<Tensor>& token_weight, const std::optional<Tensor>& carry,
    bool advantage_is_per_token, double gamma, double weight_low, double weight_high, double safety_threshold,
    double dual_clip, double clip_low, double clip_high, bool paper, Tensor grad, Tensor weight) {
  const cuda::LossArguments arguments =
      loss_arguments(logp, old_logp, advantage, response_mask, cu_seqlens, token_weight, carry, advantage_is_per_token);
  check_vector_on(grad, "grad", ScalarType::Float, arguments.num_tokens, logp);
  check_vector_on(weight, "weight", ScalarType::Float, arguments.num_tokens, logp);
  const DeviceGuard guard(logp.get_device_index());
  void* stream = current_stream(logp.get_device_index());
  Tensor loss = torch::stable::new_empty(logp, {arguments.sequences.count}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(logp, {arguments.sequences.count, 2}, ScalarType::Long);
  Tensor statistics = torch::stable::new_empty(logp, {kNumStatistics}, ScalarType::Double);
  const Workspace workspace(logp, arguments.num_tokens, stream);
  check(cuda::fipo_loss(
            arguments,
            fipo_params(gamma, weight_low, weight_high, safety_threshold, dual_clip, clip_low, clip_high, paper),
            {static_cast<double*>(loss.mutable_data_ptr()), static_cast<int64_t*>(counts.mutable_data_ptr()),
             static_cast<float*>(grad.mutable_data_ptr()), static_cast<float*>(weight.mutable_data_ptr()),
             static_cast<double*>(statistics.mutable_data_ptr())},
            workspace.view(), stream),
        "fipo_loss");
  return {loss, counts, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fipo_loss(
    const Tensor& logp, const Tensor& old_logp, const Tensor& advantage, const Tensor& response_mask,
    const Tensor& cu_seqlens, const std::optional<Tensor>& token_weight, const std::optional<Tensor>& carry,
    bool advantage_is_per_token, double gamma, double weight_low, double weight_high, double safety_threshold,
    double dual_clip, double clip_low, double clip_high, bool paper) {
  Tensor grad = torch::stable::new_empty(logp, {logp.numel()}, ScalarType::Float);
  Tensor weight = torch::stable::new_empty(logp, {logp.numel()}, ScalarType::Float);
  const auto [loss, counts, statistics] = fipo_loss_out(
      logp, old_logp, advantage, response_mask, cu_seqlens, token_weight, carry, advantage_is_per_token, gamma,
      weight_low, weight_high, safety_threshold, dual_clip, clip_low, clip_high, paper, grad, weight);
  return {loss, counts, grad, weight, statistics};
}

std::tuple<Tensor, Tensor> future_kl_aggregate(const Tensor& logp, const Tensor& old_logp, const Tensor& advantage,
                                               const Tensor& response_mask, const Tensor& cu_seqlens,
                                               bool advantage_is_per_token, double gamma, double dual_clip,
                                               double clip_low, double clip_high) {
  const cuda::LossArguments arguments =
      loss_arguments(logp, old_logp, advantage, response_mask, cu_seqlens, {}, {}, advantage_is_per_token);
  const DeviceGuard guard(logp.get_device_index());
  void* stream = current_stream(logp.get_device_index());
  Tensor aggregate = torch::stable::new_empty(logp, {arguments.sequences.count}, ScalarType::Float);
  Tensor beyond_c = torch::stable::new_empty(logp, {arguments.sequences.count}, ScalarType::Int);
  const Workspace workspace(logp, arguments.num_tokens, stream);
  check(cuda::future_kl_aggregate(
            arguments, fipo_params(gamma, 0, 0, 0, dual_clip, clip_low, clip_high, false),
            {static_cast<float*>(aggregate.mutable_data_ptr()), static_cast<int32_t*>(beyond_c.mutable_data_ptr())},
            workspace.view(), stream),
        "future_kl_aggregate");
  return {aggregate, beyond_c};
}

Tensor scale_per_sequence(const Tensor& values, const Tensor& scale, const Tensor& cu_seqlens) {
  const int64_t num_tokens = values.numel();
  check_vector(values, "values", ScalarType::Float, num_tokens);
  const cuda::PackedSequences sequences = packed_sequences(cu_seqlens, values);
  check_vector_on(scale, "scale", ScalarType::Double, sequences.count, values);
  const DeviceGuard guard(values.get_device_index());
  Tensor out = torch::stable::empty_like(values);
  check(cuda::scale_per_sequence(floats(values), static_cast<const double*>(scale.const_data_ptr()),
                                 static_cast<float*>(out.mutable_data_ptr()), num_tokens, sequences,
                                 current_stream(values.get_device_index())),
        "scale_per_sequence");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_fipo, CUDA, library) {
  library.impl("discounted_scan", TORCH_BOX(&discounted_scan));
  library.impl("discounted_scan_out", TORCH_BOX(&discounted_scan_out));
  library.impl("fipo_loss", TORCH_BOX(&fipo_loss));
  library.impl("fipo_loss_out", TORCH_BOX(&fipo_loss_out));
  library.impl("future_kl_aggregate", TORCH_BOX(&future_kl_aggregate));
  library.impl("scale_per_sequence", TORCH_BOX(&scale_per_sequence));
}
