// What the operators of every device check and convert.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>

#include "core/fipo.h"

namespace megatron_fipo {

inline void check_vector(const torch::stable::Tensor& t, const char* name, torch::headeronly::ScalarType dtype,
                         int64_t size) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(), name, " must be a contiguous vector");
  STD_TORCH_CHECK(t.numel() == size, name, " has ", t.numel(), " elements, expected ", size);
}

inline const float* floats(const torch::stable::Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

inline FipoParams fipo_params(double gamma, double weight_low, double weight_high, double safety_threshold,
                              double dual_clip, double clip_low, double clip_high, bool paper) {
  STD_TORCH_CHECK(dual_clip > 1, "dual_clip must be above 1, not ", dual_clip);
  return {gamma,
          static_cast<float>(weight_low),
          static_cast<float>(weight_high),
          static_cast<float>(safety_threshold),
          static_cast<float>(dual_clip),
          static_cast<float>(std::log(dual_clip)),
          static_cast<float>(clip_low),
          static_cast<float>(clip_high),
          paper};
}

}  // namespace megatron_fipo
