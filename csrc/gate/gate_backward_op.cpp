#include <torch/csrc/stable/library.h>

#include "gate/gate_check.h"

namespace torch_routers {
namespace {

using std::int64_t;

Tensor gate_backward(const OptionalTensor& grad_weights, const OptionalTensor& grad_lse,
                     const OptionalTensor& grad_score_sums, const Tensor& logits,
                     const Tensor& indices, int64_t score, bool renormalize, double epsilon,
                     double scale, const OptionalTensor& valid_mask,
                     const OptionalTensor& group_offsets) {
  constexpr auto op = "_gate_backward";
  check_logits(op, "logits", logits);
  check_indices(op, logits, indices);
  const GateShape shape = gate_shape(op, logits, indices.size(1), valid_mask, group_offsets);
  const auto check_gradient = [&](const char* name, const OptionalTensor& gradient,
                                  std::initializer_list<int64_t> sizes) {
    if (gradient)
      check_tensor(op, name, *gradient, logits, compute_type(logits), has_shape(*gradient, sizes),
                   Shape{{sizes.begin(), sizes.size()}});
  };
  check_gradient("grad_weights", grad_weights, {shape.tokens, shape.slots});
  check_gradient("grad_lse", grad_lse, {shape.tokens});
  check_gradient("grad_score_sums", grad_score_sums, {shape.groups, shape.experts});

  const Tensor x = as_contiguous(logits), best = as_contiguous(indices);
  const OptionalTensor valid = contiguous(valid_mask), offsets = contiguous(group_offsets);
  const OptionalTensor gw = contiguous(grad_weights), gl = contiguous(grad_lse),
                       gs = contiguous(grad_score_sums);
  check_group_offset_values(op, shape, offsets);
  check_index_values(op, shape, best);
  const Weighing weighing{score, renormalize, epsilon, scale};
  weighing.check_values(op);
  const Tensor grad_logits = allocate(x, {shape.tokens, shape.experts}, x.scalar_type());
  const OptionalTensor scratch = new_scratch(x, shape);
  dispatch_floating(op, "logits", x, [&]<class S>() {
    using C = Compute<S>;
    const GateBackward<S> params{shape,
                                 data<C>(gw),
                                 data<C>(gl),
                                 data<C>(gs),
                                 data<S>(x),
                                 data<bool>(valid),
                                 data<int64_t>(offsets),
                                 data<int64_t>(best),
                                 mutable_data<S>(grad_logits),
                                 mutable_data<C>(scratch),
                                 weighing.as<C>()};
    launch_gate(x, shape.blocks(), shape.kBlock * shape.experts, params);
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("_gate_backward(Tensor? grad_weights, Tensor? grad_lse, Tensor? grad_score_sums, "
        "Tensor logits, Tensor indices, int score, bool renormalize, float epsilon, float scale, "
        "Tensor? valid_mask, Tensor? group_offsets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("_gate_backward", TORCH_BOX(&gate_backward));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("_gate_backward", TORCH_BOX(&gate_backward));
}
#endif

}  // namespace torch_routers
