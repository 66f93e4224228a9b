// The kernels of the gate one after the other, over arrays of any kind.
#pragma once

#include <cstdint>

#include "gate/gate_kernel.h"

namespace torch_routers {

// Named as in gate_kernel.h.
template <class S> struct GateArrays {
  using C = Compute<S>;
  GateShape shape{};
  const S* logits = nullptr;
  const bool* valid = nullptr;
  const std::int64_t *group_offsets = nullptr, *token_top_k = nullptr;
  bool select = true;
  GateSelection<C> selection{};
  GateWeights<C> weighing{Score::Softmax, true, 0, 1};
  const C *grad_weights = nullptr, *grad_lse = nullptr, *grad_score_sums = nullptr;

  std::int64_t *indices = nullptr, *counts = nullptr, *group_tokens = nullptr;
  C *weights = nullptr, *lse = nullptr, *score_sums = nullptr;
  S* grad_logits = nullptr;
  C *partial_sums = nullptr, *scratch = nullptr;
  std::int64_t *partial_counts = nullptr, *partial_tokens = nullptr;
};

// run(params, count) for each kernel, whose ranges are parts of [0, count).
template <class S, class Run> void run_gate(const GateArrays<S>& a, const Run& run) {
  using C = Compute<S>;
  run(Gate<S>{a.shape, a.logits, a.valid, a.group_offsets, a.token_top_k, a.indices, a.weights,
              a.lse, a.partial_sums, a.partial_counts, a.partial_tokens, a.scratch, a.select,
              a.selection, a.weighing},
      a.shape.blocks());
  run(GateCombine<C>{a.shape, a.group_offsets, a.partial_sums, a.partial_counts, a.partial_tokens,
                     a.score_sums, a.counts, a.group_tokens},
      a.shape.groups);
  run(GateBackward<S>{a.shape, a.grad_weights, a.grad_lse, a.grad_score_sums, a.logits, a.valid,
                      a.group_offsets, a.indices, a.grad_logits, a.scratch, a.weighing},
      a.shape.blocks());
}

}  // namespace torch_routers
