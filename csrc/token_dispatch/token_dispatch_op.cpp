#include <torch/csrc/stable/library.h>

#include <tuple>

#include "token_dispatch/token_dispatch_check.h"

namespace torch_routers {
namespace {

using std::int64_t;

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
  check_same_dtype(op, "grad", grad, "rows", rows);
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
