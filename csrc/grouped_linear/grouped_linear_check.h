// What the operators of grouped_linear ask of their arguments.
#pragma once

#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {

inline void check_offsets(const char* op, const Tensor& x, const Tensor& offsets) {
  check_tensor(op, "offsets", offsets, x, ScalarType::Long, is_offsets(offsets),
               "[num_experts + 1]");
}

inline void check_linear(const char* op, const Tensor& x, const Tensor& weight,
                         const Tensor& offsets, const OptionalTensor& bias) {
  check_shape(op, "x", x, x.dim() == 2, "[rows, in_features]");
  check_floating(op, "x", x);
  check_shape(op, "weight", weight, weight.dim() == 3 && weight.size(2) == x.size(1),
              "[num_experts, out_features, in_features=", x.size(1), "]");
  check_same_dtype(op, "weight", weight, "x", x);
  const std::int64_t groups = weight.size(0), out = weight.size(1);
  check_shape(op, "offsets", offsets, offsets.dim() != 1 || offsets.size(0) == groups + 1,
              "[num_experts + 1], here [", groups + 1, "]");
  check_offsets(op, x, offsets);
  if (bias) {
    check_shape(op, "bias", *bias, has_shape(*bias, {groups, out}), "[num_experts=", groups,
                ", out_features=", out, "]");
    check_same_dtype(op, "bias", *bias, "x", x);
  }
  check_same_device(op, x, weight);
  check_same_device(op, x, bias);
}

// The offsets on the CPU, where their values are checked: which rows belong together decides which
// products are launched.
inline Tensor host_offsets(const char* op, const Tensor& offsets, std::int64_t rows) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor host = as_contiguous(offsets.is_cpu() ? offsets : torch::stable::to(offsets, cpu));
  check_offset_values(op, "offsets", host, rows, true, "at most ", rows, ", the number of rows");
  return host;
}

}  // namespace torch_routers
