#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gate/gate_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {
namespace {

using std::int64_t;
using OptionalTensor = std::optional<Tensor>;

// weights, indices, lse, score_sums, counts, group_tokens; without statistics lse is [0] and
// score_sums [0, experts]. (An op has a fixed number of results.)
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// How to weigh and to select, as the operators take it.
struct Weighing {
  int64_t score;
  bool renormalize;
  double epsilon, scale;

  template <class C> GateWeights<C> as() const {
    return {static_cast<Score>(score), renormalize, static_cast<C>(epsilon), static_cast<C>(scale)};
  }
};
struct Selection {
  OptionalTensor bias;
  int64_t num_groups, topk_group, group_best;
  OptionalTensor token_top_k;

  template <class C> GateSelection<C> as() const {
    return {data<C>(bias), num_groups > 1 ? num_groups : 0, topk_group, group_best};
  }
};

ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_logits(const char* op, const Tensor& logits) {
  check(logits.dim() == 2 && logits.size(1) >= 1, op,
        ": expected logits of shape [..., num_experts] with num_experts >= 1, got ", shape(logits));
}

// Of logits that passed check_logits.
GateShape check_shape(const char* op, const Tensor& logits, int64_t slots,
                      const OptionalTensor& valid_mask, const OptionalTensor& group_offsets) {
  const int64_t tokens = logits.size(0);
  if (valid_mask) {
    check(valid_mask->scalar_type() == ScalarType::Bool, op, ": expected valid_mask in bool, got ",
          dtype(*valid_mask));
    check(has_shape(*valid_mask, {tokens}), op, ": expected valid_mask of shape [", tokens,
          "], one value per token, got ", shape(*valid_mask));
  }
  if (group_offsets) {
    check(group_offsets->scalar_type() == ScalarType::Long, op,
          ": expected group_offsets in int64, got ", dtype(*group_offsets));
    check(group_offsets->dim() == 1 && group_offsets->size(0) >= 2, op,
          ": expected group_offsets of shape [groups + 1], got ", shape(*group_offsets));
  }
  check_same_device(op, logits, valid_mask);
  check_same_device(op, logits, group_offsets);
  return {tokens, logits.size(1), slots, group_offsets ? group_offsets->size(0) - 1 : 1};
}

OptionalTensor new_scratch(const Tensor& x, const GateShape& shape) {
  if (!x.is_cpu() || shape.scratch_size() == 0) return std::nullopt;
  return allocate(x, {shape.blocks(), shape.scratch_size()}, compute_type(x));
}

// What is in a tensor can be checked on the CPU only: on CUDA it would cost a synchronisation, and
// the kernels guard themselves instead.
void check_offsets(const char* op, const GateShape& shape, const OptionalTensor& offsets) {
  if (!offsets || !offsets->is_cpu()) return;
  const int64_t* values = data<int64_t>(*offsets);
  check(values[0] == 0 && values[shape.groups] == shape.tokens, op,
        ": expected group_offsets from 0 to the number of tokens, ", shape.tokens, ", got ",
        values[0], " to ", values[shape.groups]);
  for (int64_t g = 0; g < shape.groups; ++g)
    check(values[g] <= values[g + 1], op, ": expected group_offsets in ascending order, got ",
          values[g + 1], " after ", values[g]);
}

void check_indices(const char* op, const Tensor& logits, const Tensor& indices) {
  check(indices.scalar_type() == ScalarType::Long, op, ": expected indices in int64, got ",
        dtype(indices));
  check(indices.dim() == 2 && indices.size(0) == logits.size(0), op,
        ": expected indices of shape [", logits.size(0), ", slots], one row per token, got ",
        shape(indices));
  check_same_device(op, logits, indices);
}

void check_index_values(const char* op, const GateShape& shape, const Tensor& indices) {
  if (!indices.is_cpu()) return;
  const int64_t* values = data<int64_t>(indices);
  for (int64_t i = 0; i < shape.tokens * shape.slots; ++i)
    check(-1 <= values[i] && values[i] < shape.experts, op,
          ": expected indices in [-1, num_experts=", shape.experts, "), got ", values[i]);
}

void check_weighing(const char* op, const Weighing& weighing) {
  const auto last = static_cast<int64_t>(Score::SqrtSoftplus);
  check(0 <= weighing.score && weighing.score <= last, op, ": expected score in [0, ", last,
        "], got ", weighing.score);
  check(weighing.epsilon >= 0, op, ": expected epsilon >= 0, got ", weighing.epsilon);
}

void check_selection(const char* op, const Tensor& logits, int64_t top_k,
                     const Selection& selection) {
  const int64_t experts = logits.size(1), groups = selection.num_groups;
  check(1 <= top_k && top_k <= experts, op, ": expected top_k in [1, num_experts=", experts,
        "], got ", top_k);
  if (selection.bias) {
    check(has_shape(*selection.bias, {experts}), op,
          ": expected bias of shape [num_experts=", experts, "], got ", shape(*selection.bias));
    check(selection.bias->scalar_type() == compute_type(logits), op, ": expected bias in ",
          Dtype{compute_type(logits)}, ", got ", dtype(*selection.bias));
    check_same_device(op, logits, selection.bias);
  }
  check(groups >= 1 && experts % groups == 0, op,
        ": expected num_groups to divide num_experts=", experts, ", got ", groups);
  if (groups > 1) {
    const int64_t size = experts / groups, kept = selection.topk_group;
    check(1 <= kept && kept <= groups, op, ": expected topk_group in [1, num_groups=", groups,
          "], got ", kept);
    check(1 <= selection.group_best && selection.group_best <= size, op,
          ": expected group_score to add up at most the ", size, " experts of a group, got ",
          selection.group_best);
    check(top_k <= kept * size, op, ": expected top_k at most the ", kept * size,
          " experts of topk_group groups, got ", top_k);
  }
  if (const OptionalTensor& counts = selection.token_top_k) {
    check(counts->scalar_type() == ScalarType::Long, op, ": expected token_top_k in int64, got ",
          dtype(*counts));
    check(has_shape(*counts, {logits.size(0)}), op, ": expected token_top_k of shape [",
          logits.size(0), "], one value per token, got ", shape(*counts));
    check_same_device(op, logits, counts);
    if (!counts->is_cpu()) return;
    const Tensor values = as_contiguous(*counts);
    for (int64_t t = 0; t < logits.size(0); ++t) {
      const int64_t value = data<int64_t>(values)[t];
      check(0 <= value && value <= top_k, op, ": expected token_top_k in [0, top_k=", top_k,
            "], got ", value);
    }
  }
}

// `given`: the indices, or none to select them by `selection`.
Results run(const char* op, const Tensor& logits, const OptionalTensor& given,
            const GateShape& shape, const Weighing& weighing, const Selection& selection,
            const OptionalTensor& valid_mask, const OptionalTensor& group_offsets,
            bool statistics) {
  check_weighing(op, weighing);
  const Tensor x = as_contiguous(logits);
  const OptionalTensor valid = contiguous(valid_mask), offsets = contiguous(group_offsets);
  const OptionalTensor bias = contiguous(selection.bias), top = contiguous(selection.token_top_k);
  check_offsets(op, shape, offsets);
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
    const Gate<S> gate{
        shape,
        data<S>(x),
        data<bool>(valid),
        data<int64_t>(offsets),
        data<int64_t>(top),
        mutable_data<int64_t>(indices),
        mutable_data<C>(weights),
        statistics ? mutable_data<C>(lse) : nullptr,
        mutable_data<C>(partial_sums),
        mutable_data<int64_t>(partial_counts),
        mutable_data<int64_t>(partial_tokens),
        mutable_data<C>(scratch),
        !given,
        Selection{bias, selection.num_groups, selection.topk_group, selection.group_best, top}
            .as<C>(),
        weighing.as<C>()};
    launch(
        x, shape.blocks(), shape.kBlock * experts,
        [&](int64_t begin, int64_t end) { gate_cpu(gate, begin, end); },
        [&](void* stream) { gate_cuda(gate, stream); });
    if (!combines) return;
    const GateCombine<C> combine{shape,
                                 data<int64_t>(offsets),
                                 data<C>(partial_sums),
                                 data<int64_t>(partial_counts),
                                 data<int64_t>(partial_tokens),
                                 statistics ? mutable_data<C>(score_sums) : nullptr,
                                 mutable_data<int64_t>(counts),
                                 mutable_data<int64_t>(group_tokens)};
    launch(
        x, groups, shape.segments() * experts / groups + 1,
        [&](int64_t begin, int64_t end) { gate_cpu(combine, begin, end); },
        [&](void* stream) { gate_cuda(combine, stream); });
  });
  return {weights, indices, lse, score_sums, counts, group_tokens};
}

Results topk_gate(const Tensor& logits, int64_t top_k, int64_t score, bool renormalize,
                  double epsilon, double scale, const OptionalTensor& bias, int64_t num_groups,
                  int64_t topk_group, int64_t group_best, const OptionalTensor& token_top_k,
                  const OptionalTensor& valid_mask, const OptionalTensor& group_offsets,
                  bool statistics) {
  constexpr auto op = "topk_gate";
  check_logits(op, logits);
  const GateShape shape = check_shape(op, logits, top_k, valid_mask, group_offsets);
  const Selection selection{bias, num_groups, topk_group, group_best, token_top_k};
  check_selection(op, logits, top_k, selection);
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
  check_logits(op, logits);
  check_indices(op, logits, indices);
  const GateShape shape = check_shape(op, logits, indices.size(1), valid_mask, group_offsets);
  const auto [weights, _, lse, score_sums, counts, group_tokens] =
      run(op, logits, indices, shape, {score, renormalize, epsilon, scale}, {}, valid_mask,
          group_offsets, statistics);
  return {weights, lse, score_sums, counts, group_tokens};
}

Tensor topk_select(const Tensor& scores, int64_t top_k, int64_t score, const OptionalTensor& bias,
                   int64_t num_groups, int64_t topk_group, int64_t group_best,
                   const OptionalTensor& token_top_k, const OptionalTensor& valid_mask) {
  constexpr auto op = "topk_select";
  check(scores.dim() == 2 && scores.size(1) >= 1, op,
        ": expected scores of shape [..., num_experts] with num_experts >= 1, got ", shape(scores));
  const auto last = static_cast<int64_t>(Score::Identity);
  check(0 <= score && score <= last, op, ": expected score in [0, ", last, "], got ", score);
  const GateShape shape = check_shape(op, scores, top_k, valid_mask, std::nullopt);
  const Selection given{bias, num_groups, topk_group, group_best, token_top_k};
  check_selection(op, scores, top_k, given);

  const Tensor x = as_contiguous(scores);
  const OptionalTensor valid = contiguous(valid_mask);
  const Selection selection{contiguous(bias), num_groups, topk_group, group_best,
                            contiguous(token_top_k)};
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
    launch(
        x, shape.blocks(), shape.kBlock * shape.experts,
        [&](int64_t begin, int64_t end) { gate_cpu(gate, begin, end); },
        [&](void* stream) { gate_cuda(gate, stream); });
  });
  return indices;
}

void check_gradient(const char* name, const Tensor& logits, const OptionalTensor& gradient,
                    std::initializer_list<int64_t> sizes) {
  constexpr auto op = "_gate_backward";
  if (!gradient) return;
  check(gradient->scalar_type() == compute_type(logits), op, ": expected ", name, " in ",
        Dtype{compute_type(logits)}, ", got ", dtype(*gradient));
  check(has_shape(*gradient, sizes), op, ": expected ", name, " of shape ",
        Shape{{sizes.begin(), sizes.size()}}, ", got ", shape(*gradient));
  check_same_device(op, logits, *gradient);
}

Tensor gate_backward(const OptionalTensor& grad_weights, const OptionalTensor& grad_lse,
                     const OptionalTensor& grad_score_sums, const Tensor& logits,
                     const Tensor& indices, int64_t score, bool renormalize, double epsilon,
                     double scale, const OptionalTensor& valid_mask,
                     const OptionalTensor& group_offsets) {
  constexpr auto op = "_gate_backward";
  check_logits(op, logits);
  check_indices(op, logits, indices);
  const GateShape shape = check_shape(op, logits, indices.size(1), valid_mask, group_offsets);
  check_gradient("grad_weights", logits, grad_weights, {shape.tokens, shape.slots});
  check_gradient("grad_lse", logits, grad_lse, {shape.tokens});
  check_gradient("grad_score_sums", logits, grad_score_sums, {shape.groups, shape.experts});

  const Tensor x = as_contiguous(logits), best = as_contiguous(indices);
  const OptionalTensor valid = contiguous(valid_mask), offsets = contiguous(group_offsets);
  const OptionalTensor gw = contiguous(grad_weights), gl = contiguous(grad_lse),
                       gs = contiguous(grad_score_sums);
  check_offsets(op, shape, offsets);
  check_index_values(op, shape, best);
  const Weighing weighing{score, renormalize, epsilon, scale};
  check_weighing(op, weighing);
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
    launch(
        x, shape.blocks(), shape.kBlock * shape.experts,
        [&](int64_t begin, int64_t end) { gate_cpu(params, begin, end); },
        [&](void* stream) { gate_cuda(params, stream); });
  });
  return grad_logits;
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
  m.def("topk_select(Tensor scores, int top_k, int score, Tensor? bias, int num_groups, "
        "int topk_group, int group_best, Tensor? token_top_k, Tensor? valid_mask) -> Tensor");
  m.def("_gate_backward(Tensor? grad_weights, Tensor? grad_lse, Tensor? grad_score_sums, "
        "Tensor logits, Tensor indices, int score, bool renormalize, float epsilon, float scale, "
        "Tensor? valid_mask, Tensor? group_offsets) -> Tensor");
}

template <class Library> void implement(Library& m) {
  m.impl("topk_gate", TORCH_BOX(&topk_gate));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("topk_select", TORCH_BOX(&topk_select));
  m.impl("_gate_backward", TORCH_BOX(&gate_backward));
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) { implement(m); }

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) { implement(m); }
#endif

}  // namespace torch_routers
