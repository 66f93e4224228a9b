#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gate/gate_check.h"

namespace torch_routers {
namespace {

using std::int64_t;

// weights, indices, lse, score_sums, counts, group_tokens; without statistics lse is [0] and
// score_sums [0, experts]. (An op has a fixed number of results.)
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// `given`: the indices, or none to select them by `selection`.
Results run(const char* op, const Tensor& logits, const OptionalTensor& given,
            const GateShape& shape, const Weighing& weighing, const Selection& selection,
            const OptionalTensor& valid_mask, const OptionalTensor& group_offsets,
            bool statistics) {
  weighing.check_values(op);
  const Tensor x = as_contiguous(logits);
  const OptionalTensor valid = contiguous(valid_mask), offsets = contiguous(group_offsets);
  const Selection chosen = selection.dense();
  check_group_offset_values(op, shape, offsets);
  const Tensor indices =
      given ? as_contiguous(*given) : allocate(x, {shape.tokens, shape.slots}, ScalarType::Long);
  if (given) check_index_values(op, shape, indices);

  const auto [tokens, experts, slots, groups] = shape;
  const ScalarType type = compute_type(x);
  const Tensor weights = allocate(x, {tokens, slots}, type);
  const Tensor lse = allocate(x, {statistics ? tokens : 0}, type);
  const Tensor score_sums = allocate(x, {statistics ? groups : 0, experts}, type);
  const Tensor counts = allocate(x, {groups, experts}, ScalarType::Long);
  const Tensor group_tokens = allocate(x, {groups}, ScalarType::Long);

  // The results of a single segment are those of its group.
  const bool combines = shape.segments() != 1 || groups != 1;
  Tensor partial_sums = score_sums, partial_counts = counts, partial_tokens = group_tokens;
  if (combines) {
    if (statistics) partial_sums = allocate(x, {shape.segments(), experts}, type);
    partial_counts = allocate(x, {shape.segments(), experts}, ScalarType::Long);
    partial_tokens = allocate(x, {shape.segments()}, ScalarType::Long);
  }
  const OptionalTensor scratch = new_scratch(x, shape);

  dispatch_floating(op, "logits", x, [&]<class S>() {
    using C = Compute<S>;
    const Gate<S> gate{shape,
                       data<S>(x),
                       data<bool>(valid),
                       data<int64_t>(offsets),
                       data<int64_t>(chosen.token_top_k),
                       mutable_data<int64_t>(indices),
                       mutable_data<C>(weights),
                       statistics ? mutable_data<C>(lse) : nullptr,
                       mutable_data<C>(partial_sums),
                       mutable_data<int64_t>(partial_counts),
                       mutable_data<int64_t>(partial_tokens),
                       mutable_data<C>(scratch),
                       !given,
                       chosen.as<C>(),
                       weighing.as<C>()};
    launch_gate(x, shape.blocks(), shape.kBlock * experts, gate);
    if (!combines) return;
    const GateCombine<C> combine{shape,
                                 data<int64_t>(offsets),
                                 data<C>(partial_sums),
                                 data<int64_t>(partial_counts),
                                 data<int64_t>(partial_tokens),
                                 statistics ? mutable_data<C>(score_sums) : nullptr,
                                 mutable_data<int64_t>(counts),
                                 mutable_data<int64_t>(group_tokens)};
    launch_gate(x, groups, shape.segments() * experts / groups + 1, combine);
  });
  return {weights, indices, lse, score_sums, counts, group_tokens};
}

Results topk_gate(const Tensor& logits, int64_t top_k, int64_t score, bool renormalize,
                  double epsilon, double scale, const OptionalTensor& bias, int64_t num_groups,
                  int64_t topk_group, int64_t group_best, const OptionalTensor& token_top_k,
                  const OptionalTensor& valid_mask, const OptionalTensor& group_offsets,
                  bool statistics) {
  constexpr auto op = "topk_gate";
  check_logits(op, "logits", logits);
  const GateShape shape = gate_shape(op, logits, top_k, valid_mask, group_offsets);
  const Selection selection{bias, num_groups, topk_group, group_best, token_top_k};
  selection.check_values(op, logits, top_k);
  return run(op, logits, std::nullopt, shape, {score, renormalize, epsilon, scale}, selection,
             valid_mask, group_offsets, statistics);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate(const Tensor& logits, const Tensor& indices,
                                                        int64_t score, bool renormalize,
                                                        double epsilon, double scale,
                                                        const OptionalTensor& valid_mask,
                                                        const OptionalTensor& group_offsets,
                                                        bool statistics) {
  constexpr auto op = "gate";
  check_logits(op, "logits", logits);
  check_indices(op, logits, indices);
  const GateShape shape = gate_shape(op, logits, indices.size(1), valid_mask, group_offsets);
  const auto [weights, _, lse, score_sums, counts, group_tokens] =
      run(op, logits, indices, shape, {score, renormalize, epsilon, scale}, {}, valid_mask,
          group_offsets, statistics);
  return {weights, lse, score_sums, counts, group_tokens};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("topk_gate(Tensor logits, int top_k, int score, bool renormalize, float epsilon, "
        "float scale, Tensor? bias, int num_groups, int topk_group, int group_best, "
        "Tensor? token_top_k, Tensor? valid_mask, Tensor? group_offsets, bool statistics) -> "
        "(Tensor weights, Tensor indices, Tensor lse, Tensor score_sums, Tensor counts, "
        "Tensor group_tokens)");
  m.def("gate(Tensor logits, Tensor indices, int score, bool renormalize, float epsilon, "
        "float scale, Tensor? valid_mask, Tensor? group_offsets, bool statistics) -> "
        "(Tensor weights, Tensor lse, Tensor score_sums, Tensor counts, Tensor group_tokens)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("topk_gate", TORCH_BOX(&topk_gate));
  m.impl("gate", TORCH_BOX(&gate));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("topk_gate", TORCH_BOX(&topk_gate));
  m.impl("gate", TORCH_BOX(&gate));
}
#endif

}  // namespace torch_routers
