#include <torch/csrc/stable/library.h>

#include <tuple>

#include "op/check.h"
#include "op/dispatch.h"
#include "token_dispatch/token_dispatch_kernel.h"

namespace torch_routers {
namespace {

using std::int64_t;
using OptionalTensor = std::optional<Tensor>;

// A plan whose values have been checked, where they can be: on CUDA that would wait for the device.
struct CheckedPlan {
  Tensor order, inverse;
  int64_t used_rows = 0;  // known on the CPU alone

  int64_t tokens() const { return inverse.size(0); }
  int64_t slots() const { return inverse.size(1); }
  int64_t max_rows() const { return order.size(0); }
  DispatchPlan of_width(int64_t hidden) const {
    return {tokens(), slots(), max_rows(), hidden, data<int64_t>(order), data<int64_t>(inverse)};
  }
};

void check_plan_shape(const char* op, const Tensor& order, const Tensor& inverse) {
  check(order.scalar_type() == ScalarType::Long, op, ": expected plan.order in int64, got ",
        dtype(order));
  check(inverse.scalar_type() == ScalarType::Long, op, ": expected plan.inverse in int64, got ",
        dtype(inverse));
  check(order.dim() == 1, op, ": expected plan.order of shape [max_rows], got ", shape(order));
  check(inverse.dim() == 2, op, ": expected plan.inverse of shape [tokens, slots], got ",
        shape(inverse));
}

// Order and inverse are each other's inverse: each used row names a slot that names it, and there
// are no more slots that name a row.
CheckedPlan checked_plan(const char* op, const Tensor& order, const Tensor& inverse) {
  CheckedPlan plan{as_contiguous(order), as_contiguous(inverse)};
  if (!order.is_cpu()) return plan;
  const int64_t *slot_of = data<int64_t>(plan.order), *row_of = data<int64_t>(plan.inverse);
  const int64_t slots = plan.tokens() * plan.slots();
  for (int64_t r = 0; r < plan.max_rows(); ++r) {
    const int64_t slot = slot_of[r];
    if (slot == -1) continue;
    if (slot < 0 || slot >= slots)
      check(false, op, ": expected plan.order in [-1, tokens * slots=", slots, "), got ", slot);
    if (row_of[slot] != r)
      check(false, op, ": expected plan.inverse with row ", r, " for slot ", slot,
            ", as in plan.order, got ", row_of[slot]);
    ++plan.used_rows;
  }
  if (slots - std::count(row_of, row_of + slots, -1) == plan.used_rows) return plan;
  for (int64_t i = 0; i < slots; ++i) {
    check(-1 <= row_of[i] && row_of[i] < plan.max_rows(), op,
          ": expected plan.inverse in [-1, max_rows=", plan.max_rows(), "), got ", row_of[i]);
    check(row_of[i] == -1 || slot_of[row_of[i]] == i, op, ": expected plan.order with slot ", i,
          " in row ", row_of[i], ", as in plan.inverse, got ",
          row_of[i] == -1 ? -1 : slot_of[row_of[i]]);
  }
  return plan;
}

void check_rows(const char* op, const char* name, const Tensor& rows, const Tensor& order) {
  check(rows.dim() == 2 && rows.size(0) == order.size(0), op, ": expected ", name,
        " of shape [max_rows=", order.size(0), ", hidden], got ", shape(rows));
  check_same_device(op, rows, order);
}

void check_tokens(const char* op, const char* name, const Tensor& tokens, const Tensor& inverse) {
  check(tokens.dim() == 2, op, ": expected ", name, " of shape [tokens, hidden], got ",
        shape(tokens));
  check(tokens.size(0) == inverse.size(0), op, ": expected ", name, " with ", inverse.size(0),
        " tokens, those of the plan, got ", tokens.size(0));
  check_same_device(op, tokens, inverse);
}

// Weights are in the dtype in which the kernels compute.
void check_weights(const char* op, const OptionalTensor& weights, const Tensor& of,
                   const Tensor& inverse) {
  if (!weights) return;
  const bool is_double = of.scalar_type() == ScalarType::Double;
  check(weights->scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float), op,
        ": expected weights in ", is_double ? "float64" : "float32", " with ", dtype(of), ", got ",
        dtype(*weights));
  check(has_shape(*weights, {inverse.size(0), inverse.size(1)}), op,
        ": expected weights of shape [tokens=", inverse.size(0), ", slots=", inverse.size(1),
        "], got ", shape(*weights));
  check_same_device(op, of, weights);
}

template <class T> void clear_unused(const CheckedPlan& plan, const Tensor& rows) {
  if (!rows.is_cpu() || plan.used_rows == plan.max_rows()) return;
  const int64_t hidden = rows.size(1);
  const ClearUnused<T> params{plan.of_width(hidden), mutable_data<T>(rows)};
  launch(
      rows, plan.max_rows(), hidden,
      [&](int64_t begin, int64_t end) { dispatch_cpu(params, begin, end); }, [](void*) {});
}

template <class Params>
void launch_tokens(const Tensor& tensor, const Params& params) {
  launch(
      tensor, params.tokens, (params.slots + 1) * params.hidden,
      [&](int64_t begin, int64_t end) { dispatch_cpu(params, begin, end); },
      [&](void* stream) { dispatch_cuda(params, stream); });
}

Tensor permute_tokens(const Tensor& x, const OptionalTensor& weights, const Tensor& order,
                      const Tensor& inverse) {
  constexpr auto op = "permute_tokens";
  check_plan_shape(op, order, inverse);
  check_tokens(op, "x", x, inverse);
  check_same_device(op, x, order);
  Tensor rows;
  dispatch_floating(op, "x", x, [&]<class T>() {
    check_weights(op, weights, x, inverse);
    const CheckedPlan plan = checked_plan(op, order, inverse);
    const Tensor tokens = as_contiguous(x);
    const OptionalTensor w = contiguous(weights);
    rows = allocate(x, {plan.max_rows(), x.size(1)});
    launch_tokens(x, Permute<T>{plan.of_width(x.size(1)), data<T>(tokens), data<Compute<T>>(w),
                                mutable_data<T>(rows)});
    clear_unused<T>(plan, rows);
  });
  return rows;
}

Tensor combine_tokens(const Tensor& rows, const OptionalTensor& weights, const Tensor& order,
                      const Tensor& inverse) {
  constexpr auto op = "combine_tokens";
  check_plan_shape(op, order, inverse);
  check_rows(op, "rows", rows, order);
  check_same_device(op, rows, inverse);
  Tensor y;
  dispatch_floating(op, "rows", rows, [&]<class T>() {
    check_weights(op, weights, rows, inverse);
    const CheckedPlan plan = checked_plan(op, order, inverse);
    const Tensor r = as_contiguous(rows);
    const OptionalTensor w = contiguous(weights);
    y = allocate(rows, {plan.tokens(), rows.size(1)});
    launch_tokens(y, Combine<T>{plan.of_width(rows.size(1)), data<T>(r), data<Compute<T>>(w),
                                mutable_data<T>(y)});
  });
  return y;
}

// Without weights, grad_rows is [0, hidden].
std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad, const Tensor& rows,
                                            const OptionalTensor& weights, const Tensor& order,
                                            const Tensor& inverse) {
  constexpr auto op = "_combine_backward";
  check_plan_shape(op, order, inverse);
  check_rows(op, "rows", rows, order);
  check_tokens(op, "grad", grad, inverse);
  check_same_device(op, grad, order);
  check(grad.size(1) == rows.size(1), op, ": expected grad of hidden size ", rows.size(1),
        ", that of rows, got ", grad.size(1));
  check(grad.scalar_type() == rows.scalar_type(), op, ": expected grad in the dtype of rows, ",
        dtype(rows), ", got ", dtype(grad));
  Tensor grad_rows, grad_weights;
  dispatch_floating(op, "grad", grad, [&]<class T>() {
    check_weights(op, weights, rows, inverse);
    const CheckedPlan plan = checked_plan(op, order, inverse);
    const Tensor g = as_contiguous(grad), r = as_contiguous(rows);
    const OptionalTensor w = contiguous(weights);
    grad_rows = allocate(grad, {weights ? plan.max_rows() : 0, grad.size(1)});
    grad_weights =
        allocate(grad, {plan.tokens(), plan.slots()},
                 grad.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    launch_tokens(grad, CombineBackward<T>{plan.of_width(grad.size(1)), data<T>(g), data<T>(r),
                                           data<Compute<T>>(w), mutable_data<T>(grad_rows),
                                           mutable_data<Compute<T>>(grad_weights)});
    if (weights) clear_unused<T>(plan, grad_rows);
  });
  return {grad_rows, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("permute_tokens(Tensor x, Tensor? weights, Tensor order, Tensor inverse) -> Tensor");
  m.def("combine_tokens(Tensor rows, Tensor? weights, Tensor order, Tensor inverse) -> Tensor");
  m.def("_combine_backward(Tensor grad, Tensor rows, Tensor? weights, Tensor order, "
        "Tensor inverse) -> (Tensor grad_rows, Tensor grad_weights)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("permute_tokens", TORCH_BOX(&permute_tokens));
  m.impl("combine_tokens", TORCH_BOX(&combine_tokens));
  m.impl("_combine_backward", TORCH_BOX(&combine_backward));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("permute_tokens", TORCH_BOX(&permute_tokens));
  m.impl("combine_tokens", TORCH_BOX(&combine_tokens));
  m.impl("_combine_backward", TORCH_BOX(&combine_backward));
}
#endif

}  // namespace torch_routers
