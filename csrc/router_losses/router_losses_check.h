// What router_losses and its backward ask of their arguments.
#pragma once

#include "op/check.h"
#include "op/dispatch.h"
#include "router_losses/router_losses_kernel.h"

namespace torch_routers {

// What both operators get; of a loss that is not asked for there is no weight.
struct RouterLossesInputs {
  const char* op;
  OptionalTensor lse, score_sums, counts;
  Tensor group_tokens;
  std::optional<double> balance, z, importance;
  bool switch_convention, per_group, unbiased;

  bool has_scores() const { return balance || importance; }
  const Tensor& first() const { return z ? *lse : *score_sums; }

  RouterLossesShape sizes() const {
    return {z ? lse->size(0) : 0, group_tokens.size(0), has_scores() ? score_sums->size(1) : 1,
            per_group};
  }

  void check_matrix(const char* name, const OptionalTensor& matrix) const {
    check(matrix.has_value(), op, ": expected ", name, " for the losses asked for, got none");
    const std::int64_t groups = group_tokens.size(0);
    check_shape(op, name, *matrix,
                matrix->dim() == 2 && matrix->size(0) == groups && matrix->size(1) >= 1,
                "[groups=", groups, ", num_experts]");
    check_same_device(op, first(), *matrix);
  }

  // Afterwards everything is contiguous, and what no loss needs is gone.
  void prepare() {
    check(balance || z || importance, op, ": expected the weight of a loss, got none");
    check_shape(op, "group_tokens", group_tokens, group_tokens.dim() == 1, "[groups]");
    check_dtype(op, "group_tokens", group_tokens, ScalarType::Long);
    if (z) {
      check(lse.has_value(), op, ": expected lse for the losses asked for, got none");
      check_shape(op, "lse", *lse, lse->dim() == 1, "[tokens]");
    }
    if (has_scores()) check_matrix("score_sums", score_sums);
    if (balance) {
      check_matrix("group_counts", counts);
      check_shape(op, "group_counts", *counts, counts->size(1) == score_sums->size(1),
                  shape(*score_sums), ", that of score_sums");
      check_dtype(op, "group_counts", *counts, ScalarType::Long);
    }
    if (z && has_scores()) check_same_dtype(op, "score_sums", *score_sums, "lse", *lse);
    check_same_device(op, first(), group_tokens);
    lse = z ? contiguous(lse) : std::nullopt;
    score_sums = has_scores() ? contiguous(score_sums) : std::nullopt;
    counts = balance ? contiguous(counts) : std::nullopt;
    group_tokens = as_contiguous(group_tokens);
  }

  template <class T>
  RouterLosses<T> params(const double* squares, T* total, T* values, double* lse_slope,
                         double* slopes) const {
    return {sizes(),
            data<T>(score_sums),
            data<std::int64_t>(counts),
            data<std::int64_t>(group_tokens),
            data<T>(lse),
            squares,
            importance.has_value(),
            switch_convention,
            unbiased,
            balance.value_or(0),
            z.value_or(0),
            importance.value_or(0),
            total,
            values,
            lse_slope,
            slopes};
  }
};

}  // namespace torch_routers
