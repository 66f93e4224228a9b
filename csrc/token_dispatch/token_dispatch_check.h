// What permute_tokens, combine_tokens and its backward ask of their arguments.
#pragma once

#include <algorithm>

#include "op/check.h"
#include "op/dispatch.h"
#include "token_dispatch/token_dispatch_kernel.h"

namespace torch_routers {

// A plan whose values have been checked, where they can be: on CUDA that would wait for the device.
struct CheckedPlan {
  Tensor order, inverse;
  std::int64_t used_rows = 0;  // known on the CPU alone

  std::int64_t tokens() const { return inverse.size(0); }
  std::int64_t slots() const { return inverse.size(1); }
  std::int64_t max_rows() const { return order.size(0); }
  DispatchPlan of_width(std::int64_t hidden) const {
    return {tokens(),
            slots(),
            max_rows(),
            hidden,
            data<std::int64_t>(order),
            data<std::int64_t>(inverse)};
  }
};

// Order and inverse are each other's inverse: each used row names a slot that names it, and there
// are no more slots that name a row.
inline CheckedPlan checked_plan(const char* op, const Tensor& order, const Tensor& inverse) {
  CheckedPlan plan{as_contiguous(order), as_contiguous(inverse)};
  if (!order.is_cpu()) return plan;
  const std::int64_t *slot_of = data<std::int64_t>(plan.order),
                     *row_of = data<std::int64_t>(plan.inverse);
  const std::int64_t slots = plan.tokens() * plan.slots();
  for (std::int64_t r = 0; r < plan.max_rows(); ++r) {
    const std::int64_t slot = slot_of[r];
    if (slot == -1) continue;
    if (slot < 0 || slot >= slots)
      check(false, op, ": expected plan.order in [-1, tokens * slots=", slots, "), got ", slot);
    if (row_of[slot] != r)
      check(false, op, ": expected plan.inverse with row ", r, " for slot ", slot,
            ", as in plan.order, got ", row_of[slot]);
    ++plan.used_rows;
  }
  if (slots - std::count(row_of, row_of + slots, -1) == plan.used_rows) return plan;
  for (std::int64_t i = 0; i < slots; ++i) {
    check(-1 <= row_of[i] && row_of[i] < plan.max_rows(), op,
          ": expected plan.inverse in [-1, max_rows=", plan.max_rows(), "), got ", row_of[i]);
    check(row_of[i] == -1 || slot_of[row_of[i]] == i, op, ": expected plan.order with slot ", i,
          " in row ", row_of[i], ", as in plan.inverse, got ",
          row_of[i] == -1 ? -1 : slot_of[row_of[i]]);
  }
  return plan;
}

inline void check_plan_shape(const char* op, const Tensor& order, const Tensor& inverse) {
  check_dtype(op, "plan.order", order, ScalarType::Long);
  check_dtype(op, "plan.inverse", inverse, ScalarType::Long);
  check_shape(op, "plan.order", order, order.dim() == 1, "[max_rows]");
  check_shape(op, "plan.inverse", inverse, inverse.dim() == 2, "[tokens, slots]");
}

inline void check_rows(const char* op, const char* name, const Tensor& rows, const Tensor& order) {
  check_shape(op, name, rows, rows.dim() == 2 && rows.size(0) == order.size(0),
              "[max_rows=", order.size(0), ", hidden]");
  check_same_device(op, rows, order);
}

inline void check_tokens(const char* op, const char* name, const Tensor& tokens,
                         const Tensor& inverse) {
  check_shape(op, name, tokens, tokens.dim() == 2, "[tokens, hidden]");
  check(tokens.size(0) == inverse.size(0), op, ": expected ", name, " with ", inverse.size(0),
        " tokens, those of the plan, got ", tokens.size(0));
  check_same_device(op, tokens, inverse);
}

// Weights are in the dtype in which the kernels compute.
inline void check_weights(const char* op, const OptionalTensor& weights, const Tensor& of,
                          const Tensor& inverse) {
  if (!weights) return;
  const bool is_double = of.scalar_type() == ScalarType::Double;
  check(weights->scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float), op,
        ": expected weights in ", is_double ? "float64" : "float32", " with ", dtype(of), ", got ",
        dtype(*weights));
  check_shape(op, "weights", *weights, has_shape(*weights, {inverse.size(0), inverse.size(1)}),
              "[tokens=", inverse.size(0), ", slots=", inverse.size(1), "]");
  check_same_device(op, of, weights);
}

}  // namespace torch_routers
