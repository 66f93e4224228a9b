// What the operators of the gate share: the checks of their arguments, and how these become those of
// the kernels.
#pragma once

#include "gate/gate_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {

inline ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_logits(const char* op, const char* name, const Tensor& logits) {
  check_shape(op, name, logits, logits.dim() == 2 && logits.size(1) >= 1,
              "[..., num_experts] with num_experts >= 1");
}

// Of logits that passed check_logits.
inline GateShape gate_shape(const char* op, const Tensor& logits, std::int64_t slots,
                            const OptionalTensor& valid_mask, const OptionalTensor& offsets) {
  const std::int64_t tokens = logits.size(0);
  if (valid_mask)
    check_tensor(op, "valid_mask", *valid_mask, logits, ScalarType::Bool,
                 has_shape(*valid_mask, {tokens}), "[", tokens, "], one value per token");
  if (offsets)
    check_tensor(op, "group_offsets", *offsets, logits, ScalarType::Long, is_offsets(*offsets),
                 "[groups + 1]");
  return {tokens, logits.size(1), slots, offsets ? offsets->size(0) - 1 : 1};
}

// ---- given indices ------------------------------------------------------------------------------

inline void check_indices(const char* op, const Tensor& logits, const Tensor& indices) {
  const std::int64_t tokens = logits.size(0);
  check_tensor(op, "indices", indices, logits, ScalarType::Long,
               indices.dim() == 2 && indices.size(0) == tokens, "[", tokens,
               ", slots], one row per token");
}

// What is in a tensor can be checked on the CPU only: on CUDA it would cost a synchronisation, and
// the kernels guard themselves instead.
inline void check_index_values(const char* op, const GateShape& shape, const Tensor& indices) {
  if (!indices.is_cpu()) return;
  const auto* values = data<std::int64_t>(indices);
  const std::int64_t count = shape.tokens * shape.slots;
  bool all_fit = true;  // at first without a branch per value: this runs in every backward
  for (std::int64_t i = 0; i < count; ++i) all_fit &= -1 <= values[i] && values[i] < shape.experts;
  for (std::int64_t i = 0; !all_fit && i < count; ++i)
    check(-1 <= values[i] && values[i] < shape.experts, op,
          ": expected indices in [-1, num_experts=", shape.experts, "), got ", values[i]);
}

inline void check_group_offset_values(const char* op, const GateShape& shape,
                                      const OptionalTensor& offsets) {
  if (offsets && offsets->is_cpu())
    check_offset_values(op, "group_offsets", *offsets, shape.tokens, false,
                        "the number of tokens, ", shape.tokens);
}

// ---- how to weigh -------------------------------------------------------------------------------

inline void check_score(const char* op, std::int64_t score, Score largest) {
  const auto last = static_cast<std::int64_t>(largest);
  check(0 <= score && score <= last, op, ": expected score in [0, ", last, "], got ", score);
}

struct Weighing {
  std::int64_t score;
  bool renormalize;
  double epsilon, scale;

  void check_values(const char* op) const {
    check_score(op, score, Score::SqrtSoftplus);
    check(epsilon >= 0, op, ": expected epsilon >= 0, got ", epsilon);
  }
  template <class C> GateWeights<C> as() const {
    return {static_cast<Score>(score), renormalize, static_cast<C>(epsilon), static_cast<C>(scale)};
  }
};

// ---- how to select ------------------------------------------------------------------------------

struct Selection {
  OptionalTensor bias;
  std::int64_t num_groups, topk_group, group_best;
  OptionalTensor token_top_k;

  Selection dense() const {
    return {contiguous(bias), num_groups, topk_group, group_best, contiguous(token_top_k)};
  }
  template <class C> GateSelection<C> as() const {
    return {data<C>(bias), num_groups > 1 ? num_groups : 0, topk_group, group_best};
  }

  void check_values(const char* op, const Tensor& logits, std::int64_t top_k) const {
    const std::int64_t tokens = logits.size(0), experts = logits.size(1);
    check(1 <= top_k && top_k <= experts, op, ": expected top_k in [1, num_experts=", experts,
          "], got ", top_k);
    if (bias)
      check_tensor(op, "bias", *bias, logits, compute_type(logits), has_shape(*bias, {experts}),
                   "[num_experts=", experts, "]");
    check(num_groups >= 1 && experts % num_groups == 0, op,
          ": expected num_groups to divide num_experts=", experts, ", got ", num_groups);
    if (num_groups > 1) {
      const std::int64_t size = experts / num_groups;
      check(1 <= topk_group && topk_group <= num_groups, op,
            ": expected topk_group in [1, num_groups=", num_groups, "], got ", topk_group);
      check(1 <= group_best && group_best <= size, op,
            ": expected group_score to add up at most the ", size, " experts of a group, got ",
            group_best);
      check(top_k <= topk_group * size, op, ": expected top_k at most the ", topk_group * size,
            " experts of topk_group groups, got ", top_k);
    }
    if (!token_top_k) return;
    check_tensor(op, "token_top_k", *token_top_k, logits, ScalarType::Long,
                 has_shape(*token_top_k, {tokens}), "[", tokens, "], one value per token");
    if (!token_top_k->is_cpu()) return;
    const Tensor counts = as_contiguous(*token_top_k);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t count = data<std::int64_t>(counts)[t];
      check(0 <= count && count <= top_k, op, ": expected token_top_k in [0, top_k=", top_k,
            "], got ", count);
    }
  }
};

// ---- launch -------------------------------------------------------------------------------------

inline OptionalTensor new_scratch(const Tensor& x, const GateShape& shape) {
  if (!x.is_cpu() || shape.scratch_size() == 0) return std::nullopt;
  return allocate(x, {shape.blocks(), shape.scratch_size()}, compute_type(x));
}

template <class Params>
void launch_gate(const Tensor& x, std::int64_t count, std::int64_t cost, const Params& params) {
  launch(
      x, count, cost, [&](std::int64_t begin, std::int64_t end) { gate_cpu(params, begin, end); },
      [&](void* stream) { gate_cuda(params, stream); });
}

}  // namespace torch_routers
