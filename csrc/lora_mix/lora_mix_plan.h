// The rows that the operators of lora_mix work on: a dispatch plan, and the ranks of its experts.
#pragma once

#include <algorithm>
#include <vector>

#include "lora_mix/lora_mix_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {

// Contiguous after `prepare`.
struct LoraPlan {
  const char* op;
  Tensor order, inverse, offsets, ranks;
  std::int64_t max_rank;

  std::int64_t rows() const { return order.size(0); }
  std::int64_t tokens() const { return inverse.size(0); }
  std::int64_t slots() const { return inverse.size(1); }
  std::int64_t experts() const { return offsets.size(0) - 1; }

  // `size`: the rows of the weight.
  void prepare(const Tensor& values, std::int64_t size) {
    check_tensor(op, "order", order, values, ScalarType::Long, order.dim() == 1, "[rows]");
    check_tensor(op, "inverse", inverse, values, ScalarType::Long, inverse.dim() == 2,
                 "[tokens, slots]");
    check_tensor(op, "offsets", offsets, values, ScalarType::Long, is_offsets(offsets),
                 "[num_experts + 1]");
    check_tensor(op, "ranks", ranks, values, ScalarType::Long, has_shape(ranks, {experts() + 1}),
                 "[num_experts + 1], here [", experts() + 1, "]");
    check(max_rank >= 0 && max_rank <= size, op, ": expected max_rank in [0, ", size,
          "], the rows of the weight, got ", max_rank);
    for (Tensor* tensor : {&order, &inverse, &offsets, &ranks}) *tensor = as_contiguous(*tensor);
    if (values.is_cpu()) check_values(size);
  }

  // The kernels follow them: nothing may lie outside.
  void check_values(std::int64_t size) const {
    check_offset_values(op, "offsets", offsets, rows(), true, "at most ", rows(),
                        ", the number of rows");
    check_offset_values(op, "ranks", ranks, size, false, size, ", the rows of the weight");
    for (std::int64_t e = 0; e < experts(); ++e) {
      const std::int64_t rank = data<std::int64_t>(ranks)[e + 1] - data<std::int64_t>(ranks)[e];
      check(rank <= max_rank, op, ": expected ranks of at most max_rank=", max_rank, ", got ",
            rank);
    }
    const std::int64_t live = data<std::int64_t>(offsets)[experts()];
    const auto check_range = [&](const char* name, const Tensor& of, std::int64_t count,
                                 std::int64_t low, std::int64_t high) {
      const auto* values = data<std::int64_t>(of);
      for (std::int64_t i = 0; i < count; ++i)
        check(values[i] >= low && values[i] < high, op, ": expected ", name, " in [", low, ", ",
              high, "), got ", values[i]);
    };
    check_range("order", order, live, 0, tokens() * slots());
    check_range("inverse", inverse, tokens() * slots(), -1, live);
  }

  LoraRows params(std::int64_t features) const {
    return {tokens(),
            slots(),
            experts(),
            rows(),
            features,
            max_rank,
            data<std::int64_t>(order),
            data<std::int64_t>(inverse),
            data<std::int64_t>(offsets),
            data<std::int64_t>(ranks)};
  }

  // On the CPU, for the rows that have one.
  std::vector<std::int64_t> tokens_of_rows() const {
    std::vector<std::int64_t> result(rows());
    const std::int64_t live = data<std::int64_t>(offsets)[experts()];
    for (std::int64_t r = 0; r < live; ++r) result[r] = data<std::int64_t>(order)[r] / slots();
    return result;
  }
  std::vector<std::int64_t> experts_of_rows() const {
    std::vector<std::int64_t> result(rows());
    const auto* first = data<std::int64_t>(offsets);
    for (std::int64_t e = 0; e < experts(); ++e)
      std::fill(result.begin() + first[e], result.begin() + first[e + 1], e);
    return result;
  }
};

inline void check_tokens(const LoraPlan& plan, const char* name, const Tensor& x) {
  check_shape(plan.op, name, x, x.dim() == 2, "[tokens, features]");
  check_floating(plan.op, name, x);
}

inline void check_token_number(const LoraPlan& plan, const Tensor& x) {
  check(x.size(0) == plan.tokens(), plan.op, ": expected x with ", plan.tokens(),
        " tokens, those of the plan, got ", x.size(0));
}

inline void check_z(const LoraPlan& plan, const Tensor& z, const Tensor& like) {
  check_tensor(plan.op, "z", z, like, like.scalar_type(),
               has_shape(z, {plan.rows(), plan.max_rank}), "[rows=", plan.rows(),
               ", max_rank=", plan.max_rank, "]");
}

inline void check_weight(const LoraPlan& plan, const Tensor& weight, const Tensor& like) {
  check_shape(plan.op, "weight", weight, weight.dim() == 2, "[sum of ranks, features]");
  check_same_dtype(plan.op, "weight", weight, "the tokens", like);
  check_same_device(plan.op, like, weight);
}

// The multiplications of all slots' products, for each of `count`.
inline std::int64_t cost_of(const LoraPlan& plan, std::int64_t features, std::int64_t count) {
  return plan.rows() * plan.max_rank / std::max<std::int64_t>(1, count) * features;
}

}  // namespace torch_routers
