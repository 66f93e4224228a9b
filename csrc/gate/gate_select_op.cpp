#include <torch/csrc/stable/library.h>

#include "gate/gate_check.h"

namespace torch_routers {
namespace {

using std::int64_t;

Tensor topk_select(const Tensor& scores, int64_t top_k, int64_t score, const OptionalTensor& bias,
                   int64_t num_groups, int64_t topk_group, int64_t group_best,
                   const OptionalTensor& token_top_k, const OptionalTensor& valid_mask) {
  constexpr auto op = "topk_select";
  check_logits(op, "scores", scores);
  check_score(op, score, Score::Identity);
  const GateShape shape = gate_shape(op, scores, top_k, valid_mask, std::nullopt);
  const Selection given{bias, num_groups, topk_group, group_best, token_top_k};
  given.check_values(op, scores, top_k);

  const Tensor x = as_contiguous(scores);
  const OptionalTensor valid = contiguous(valid_mask);
  const Selection selection = given.dense();
  const Tensor indices = allocate(x, {shape.tokens, shape.slots}, ScalarType::Long);
  const OptionalTensor scratch = new_scratch(x, shape);
  dispatch_floating(op, "scores", x, [&]<class S>() {
    using C = Compute<S>;
    Gate<S> gate{};
    static_cast<GateShape&>(gate) = shape;
    gate.logits = data<S>(x);
    gate.valid = data<bool>(valid);
    gate.token_top_k = data<int64_t>(selection.token_top_k);
    gate.indices = mutable_data<int64_t>(indices);
    gate.scratch = mutable_data<C>(scratch);
    gate.select = true;
    gate.selection = selection.as<C>();
    gate.weighing.score = static_cast<Score>(score);
    launch_gate(x, shape.blocks(), shape.kBlock * shape.experts, gate);
  });
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("topk_select(Tensor scores, int top_k, int score, Tensor? bias, int num_groups, "
        "int topk_group, int group_best, Tensor? token_top_k, Tensor? valid_mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) { m.impl("topk_select", TORCH_BOX(&topk_select)); }

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("topk_select", TORCH_BOX(&topk_select));
}
#endif

}  // namespace torch_routers
