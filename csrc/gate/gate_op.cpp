#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gate/gate_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {
namespace {

using std::int64_t;
using OptionalTensor = std::optional<Tensor>;
using torch::stable::new_empty;

// weights, indices, lse, score_sums, counts, group_tokens; without statistics lse is [0] and
// score_sums [0, experts]. (An op has a fixed number of results.)
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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

// `given`: the indices, or none to select them.
Results run(const char* op, const Tensor& logits, const OptionalTensor& given,
            const GateShape& shape, bool renormalize, const OptionalTensor& valid_mask,
            const OptionalTensor& group_offsets, bool statistics) {
  const Tensor x = torch::stable::contiguous(logits);
  const OptionalTensor valid = contiguous(valid_mask), offsets = contiguous(group_offsets);
  check_offsets(op, shape, offsets);
  const Tensor indices = given ? torch::stable::contiguous(*given)
                               : new_empty(x, {shape.tokens, shape.slots}, ScalarType::Long);
  if (given) check_index_values(op, shape, indices);

  const int64_t rows = statistics ? shape.tokens : 0, groups = statistics ? shape.groups : 0;
  const Tensor weights = new_empty(x, {shape.tokens, shape.slots});
  const Tensor lse = new_empty(x, {rows});
  const Tensor score_sums = new_empty(x, {groups, shape.experts});
  const Tensor counts = new_empty(x, {shape.groups, shape.experts}, ScalarType::Long);
  const Tensor group_tokens = new_empty(x, {shape.groups}, ScalarType::Long);

  OptionalTensor scores, partial_sums;
  if (x.is_cpu() && (statistics || !renormalize))
    scores = new_empty(x, {shape.blocks(), shape.experts});
  if (statistics) partial_sums = new_empty(x, {shape.segments(), shape.experts});
  const Tensor partial_counts = new_empty(x, {shape.segments(), shape.experts}, ScalarType::Long);

  dispatch_float_double(op, "logits", x, [&]<class T>() {
    const Gate<T> gate{shape,
                       data<T>(x),
                       data<bool>(valid),
                       data<int64_t>(offsets),
                       mutable_data<int64_t>(indices),
                       mutable_data<T>(weights),
                       statistics ? mutable_data<T>(lse) : nullptr,
                       mutable_data<T>(scores),
                       mutable_data<T>(partial_sums),
                       mutable_data<int64_t>(partial_counts),
                       !given,
                       renormalize};
    launch(
        x, shape.blocks(), shape.kBlock * shape.experts,
        [&](int64_t begin, int64_t end) { gate_cpu(gate, begin, end); },
        [&](void* stream) { gate_cuda(gate, stream); });

    const GateCombine<T> combine{shape,
                                 data<bool>(valid),
                                 data<int64_t>(offsets),
                                 data<T>(partial_sums),
                                 data<int64_t>(partial_counts),
                                 statistics ? mutable_data<T>(score_sums) : nullptr,
                                 mutable_data<int64_t>(counts),
                                 mutable_data<int64_t>(group_tokens)};
    launch(
        x, shape.groups, shape.segments() * shape.experts / shape.groups + 1,
        [&](int64_t begin, int64_t end) { gate_cpu(combine, begin, end); },
        [&](void* stream) { gate_cuda(combine, stream); });
  });
  return {weights, indices, lse, score_sums, counts, group_tokens};
}

Results topk_gate(const Tensor& logits, int64_t top_k, bool renormalize,
                  const OptionalTensor& valid_mask, const OptionalTensor& group_offsets,
                  bool statistics) {
  constexpr auto op = "topk_gate";
  check_logits(op, logits);
  const GateShape shape = check_shape(op, logits, top_k, valid_mask, group_offsets);
  check(1 <= top_k && top_k <= shape.experts, op,
        ": expected top_k in [1, num_experts=", shape.experts, "], got ", top_k);
  return run(op, logits, std::nullopt, shape, renormalize, valid_mask, group_offsets, statistics);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate(const Tensor& logits, const Tensor& indices,
                                                        bool renormalize,
                                                        const OptionalTensor& valid_mask,
                                                        const OptionalTensor& group_offsets,
                                                        bool statistics) {
  constexpr auto op = "gate";
  check_logits(op, logits);
  check_indices(op, logits, indices);
  const GateShape shape = check_shape(op, logits, indices.size(1), valid_mask, group_offsets);
  const auto [weights, _, lse, score_sums, counts, group_tokens] =
      run(op, logits, indices, shape, renormalize, valid_mask, group_offsets, statistics);
  return {weights, lse, score_sums, counts, group_tokens};
}

void check_gradient(const char* name, const Tensor& logits, const OptionalTensor& gradient,
                    std::initializer_list<int64_t> sizes) {
  constexpr auto op = "_gate_backward";
  if (!gradient) return;
  check(gradient->scalar_type() == logits.scalar_type(), op, ": expected ", name,
        " in the dtype of the logits, ", dtype(logits), ", got ", dtype(*gradient));
  check(has_shape(*gradient, sizes), op, ": expected ", name, " of shape ",
        Shape{{sizes.begin(), sizes.size()}}, ", got ", shape(*gradient));
  check_same_device(op, logits, *gradient);
}

Tensor gate_backward(const OptionalTensor& grad_weights, const OptionalTensor& grad_lse,
                     const OptionalTensor& grad_score_sums, const Tensor& logits,
                     const Tensor& indices, bool renormalize, const OptionalTensor& valid_mask,
                     const OptionalTensor& group_offsets) {
  constexpr auto op = "_gate_backward";
  check_logits(op, logits);
  check_indices(op, logits, indices);
  const GateShape shape = check_shape(op, logits, indices.size(1), valid_mask, group_offsets);
  check_gradient("grad_weights", logits, grad_weights, {shape.tokens, shape.slots});
  check_gradient("grad_lse", logits, grad_lse, {shape.tokens});
  check_gradient("grad_score_sums", logits, grad_score_sums, {shape.groups, shape.experts});

  const Tensor x = torch::stable::contiguous(logits), best = torch::stable::contiguous(indices);
  const OptionalTensor valid = contiguous(valid_mask), offsets = contiguous(group_offsets);
  const OptionalTensor gw = contiguous(grad_weights), gl = contiguous(grad_lse),
                       gs = contiguous(grad_score_sums);
  check_offsets(op, shape, offsets);
  check_index_values(op, shape, best);
  const Tensor grad_logits = new_empty(x, {shape.tokens, shape.experts});
  dispatch_float_double(op, "logits", x, [&]<class T>() {
    const GateBackward<T> params{shape,
                                 data<T>(gw),
                                 data<T>(gl),
                                 data<T>(gs),
                                 data<T>(x),
                                 data<bool>(valid),
                                 data<int64_t>(offsets),
                                 data<int64_t>(best),
                                 mutable_data<T>(grad_logits),
                                 renormalize};
    launch(
        x, shape.tokens, shape.experts,
        [&](int64_t begin, int64_t end) { gate_cpu(params, begin, end); },
        [&](void* stream) { gate_cuda(params, stream); });
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("topk_gate(Tensor logits, int top_k, bool renormalize, Tensor? valid_mask, "
        "Tensor? group_offsets, bool statistics) -> (Tensor weights, Tensor indices, Tensor lse, "
        "Tensor score_sums, Tensor counts, Tensor group_tokens)");
  m.def("gate(Tensor logits, Tensor indices, bool renormalize, Tensor? valid_mask, "
        "Tensor? group_offsets, bool statistics) -> (Tensor weights, Tensor lse, "
        "Tensor score_sums, Tensor counts, Tensor group_tokens)");
  m.def("_gate_backward(Tensor? grad_weights, Tensor? grad_lse, Tensor? grad_score_sums, "
        "Tensor logits, Tensor indices, bool renormalize, Tensor? valid_mask, "
        "Tensor? group_offsets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("topk_gate", TORCH_BOX(&topk_gate));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("_gate_backward", TORCH_BOX(&gate_backward));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("topk_gate", TORCH_BOX(&topk_gate));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("_gate_backward", TORCH_BOX(&gate_backward));
}
#endif

}  // namespace torch_routers
