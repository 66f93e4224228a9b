// The rows that the operators of lora_mix work on: a dispatch plan, and the ranks of its experts.
#pragma once

#include <optional>
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

  // `size`: the rows of the weight, if there is one.
  void prepare(const Tensor& values, std::optional<std::int64_t> size) {
    check_tensor(op, "order", order, values, ScalarType::Long, order.dim() == 1, "[rows]");
    check_tensor(op, "inverse", inverse, values, ScalarType::Long, inverse.dim() == 2,
                 "[tokens, slots]");
    check_tensor(op, "offsets", offsets, values, ScalarType::Long, is_offsets(offsets),
                 "[num_experts + 1]");
    check_tensor(op, "ranks", ranks, values, ScalarType::Long, has_shape(ranks, {experts() + 1}),
                 "[num_experts + 1], here [", experts() + 1, "]");
    check(max_rank >= 0, op, ": expected max_rank >= 0, got ", max_rank);
    for (Tensor* tensor : {&order, &inverse, &offsets, &ranks}) *tensor = as_contiguous(*tensor);
    if (values.is_cpu()) check_values(size);
  }

  // The kernels follow them: nothing may lie outside.
  void check_values(std::optional<std::int64_t> size) const {
    check_offset_values(op, "offsets", offsets, rows(), true, "at most ", rows(),
                        ", the number of rows");
    const std::int64_t total = size.value_or(data<std::int64_t>(ranks)[experts()]);
    check_offset_values(op, "ranks", ranks, total, false, total, ", the rows of the weight");
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

}  // namespace torch_routers
