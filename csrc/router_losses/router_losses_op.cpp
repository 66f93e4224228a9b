#include <torch/csrc/stable/library.h>

#include <tuple>

#include "router_losses/router_losses_check.h"

namespace torch_routers {
namespace {

using std::int64_t;
using Weight = std::optional<double>;  // none: the loss is not asked for

template <class Params>
void run(const Tensor& on, int64_t count, int64_t cost, const Params& params) {
  launch(
      on, count, cost, [&](int64_t begin, int64_t end) { router_losses_cpu(params, begin, end); },
      [&](void* stream) { router_losses_cuda(params, stream); });
}

std::tuple<Tensor, Tensor> router_losses(const OptionalTensor& lse,
                                         const OptionalTensor& score_sums,
                                         const OptionalTensor& counts, const Tensor& group_tokens,
                                         Weight balance, Weight z, Weight importance,
                                         bool switch_convention, bool per_group, bool unbiased) {
  RouterLossesInputs in{"router_losses",   lse,       score_sums, counts,
                        group_tokens,      balance,   z,          importance,
                        switch_convention, per_group, unbiased};
  in.prepare();
  const Tensor& first = in.first();
  const RouterLossesShape shape = in.sizes();
  const Tensor total = allocate(first, {}), values = allocate(first, {3});
  OptionalTensor squares;
  if (z && shape.blocks() > 1) squares = allocate(first, {shape.blocks()}, ScalarType::Double);
  dispatch_float_double(in.op, z ? "lse" : "score_sums", first, [&]<class T>() {
    if (squares)
      run(first, shape.blocks(), shape.kBlock,
          LseSquares<T>{shape, data<T>(in.lse), mutable_data<double>(squares)});
    run(first, 1, 1,
        in.params<T>(data<double>(squares), mutable_data<T>(total), mutable_data<T>(values),
                     nullptr, nullptr));
  });
  return {total, values};
}

std::tuple<Tensor, Tensor> router_losses_backward(
    const Tensor& grad_total, const OptionalTensor& lse, const OptionalTensor& score_sums,
    const OptionalTensor& counts, const Tensor& group_tokens, Weight balance, Weight z,
    Weight importance, bool switch_convention, bool per_group, bool unbiased) {
  RouterLossesInputs in{"_router_losses_backward",
                        lse,
                        score_sums,
                        counts,
                        group_tokens,
                        balance,
                        z,
                        importance,
                        switch_convention,
                        per_group,
                        unbiased};
  in.prepare();
  const Tensor& first = in.first();
  check(grad_total.dim() == 0 && grad_total.scalar_type() == first.scalar_type(), in.op,
        ": expected grad_total, a scalar in ", dtype(first), ", got ", dtype(grad_total),
        " of shape ", shape(grad_total));
  check_same_device(in.op, first, grad_total);
  const RouterLossesShape shape = in.sizes();
  const bool has_scores = in.has_scores();
  const int64_t groups = has_scores ? shape.groups : 0, experts = has_scores ? shape.experts : 0;
  const Tensor grad_lse = allocate(first, {shape.tokens});
  const Tensor grad_score_sums = allocate(first, {groups, experts});
  const Tensor slopes = allocate(first, {1 + shape.sets() * experts}, ScalarType::Double);
  double* slope = mutable_data<double>(slopes);
  dispatch_float_double(in.op, z ? "lse" : "score_sums", first, [&]<class T>() {
    run(first, 1, 1, in.params<T>(nullptr, nullptr, nullptr, slope, slope + 1));
    run(first, shape.tokens + groups * experts, 1,
        RouterLossesBackward<T>{shape, data<T>(grad_total), data<T>(in.lse), slope, slope + 1,
                                mutable_data<T>(grad_lse),
                                has_scores ? mutable_data<T>(grad_score_sums) : nullptr});
  });
  return {grad_lse, grad_score_sums};
}

}  // namespace

#define TORCH_ROUTERS_STATISTICS                                          \
  "Tensor? lse, Tensor? score_sums, Tensor? counts, Tensor group_tokens, " \
  "float? balance, float? z, float? importance, bool switch_convention, bool per_group, " \
  "bool unbiased"

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("router_losses(" TORCH_ROUTERS_STATISTICS ") -> (Tensor total, Tensor values)");
  m.def("_router_losses_backward(Tensor grad_total, " TORCH_ROUTERS_STATISTICS
        ") -> (Tensor grad_lse, Tensor grad_score_sums)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("router_losses", TORCH_BOX(&router_losses));
  m.impl("_router_losses_backward", TORCH_BOX(&router_losses_backward));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("router_losses", TORCH_BOX(&router_losses));
  m.impl("_router_losses_backward", TORCH_BOX(&router_losses_backward));
}
#endif

}  // namespace torch_routers
