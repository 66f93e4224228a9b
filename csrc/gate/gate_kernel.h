// The gate: from logits and the experts of each token to combine weights, and what losses need of
// the same pass. With x the logits of a valid token, s = score(x), p = softmax(x), i_j its expert in
// slot j, and D = sum_j s[i_j] + epsilon:
//
//   weight      w_j = scale s[i_j], or scale s[i_j] / D if `renormalize`; 0 where i_j = -1
//   statistics  lse = ln sum_e exp x_e           per token
//               score_sums[g, e] = sum_t s_te / sum_f s_tf   over the valid tokens of group g
//               counts[g, e]                     slots of expert e, over the same tokens
//               group_tokens[g]                  their number
//   gradient    r_e = sum over the slots j with i_j = e of
//                     scale v_j, or scale (v_j - sum_l v_l s[i_l] / D) / D if `renormalize`
//                     + (h_e - sum_f h_f s_f / S) / S,  S = sum_f s_f
//               dL/dx_e = r_e s'(x_e) + l p_e; for softmax, where S = 1 and s = p,
//               dL/dx_e = p_e (r_e + h_e - sum_f (r_f + h_f) p_f + l), r without the h term
//               v_j, h, l: gradients of w_j, score_sums, lse
//
// Scores: softmax; sigmoid 1 / (1 + e^-x); square root of softplus, ln(1 + e^x). Without an epsilon
// renormalised softmax is the softmax of the slots alone, and is computed as that.
//
// `select`: the i_j are chosen and written; else they are read. Chosen are the experts of the
// largest logits, which have the order of their scores without the ties of rounding; with a bias, of
// the largest score + bias. Largest first; order of values: common/score.h. With groups of experts
// those of the kept_groups best groups alone. The value of a group is the sum, largest first, of its
// group_best largest scores + bias; of one without a bias, its logit. With token_top_k the slots
// past that of the token are empty, -1.
//
// A masked token has indices -1, weights, lse and gradient 0, is counted nowhere, and its logits are
// never looked at. A row whose logits are all -infinity has weights, scores and gradient 0.
//
// Callers check that indices, offsets and token_top_k fit; the CUDA kernels, for which that would
// cost a synchronisation, guard themselves: the weight of an index out of range is NaN there.
//
// All arrays are dense and row-major. The tokens of group g are [group_offsets[g],
// group_offsets[g + 1]); without offsets all tokens are one group.
//
// Sums over tokens do not depend on threads: tokens come in blocks of kBlock; the part of a group in
// a block, a segment, has partial results of its own, in row block + group (both only grow, and each
// segment has at least one of them larger than the last); GateCombine adds them up in a fixed order.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

// Values: those of the operators' arguments, in the order of the names in Python.
enum class Score : std::int64_t { Softmax, Sigmoid, SqrtSoftplus, Identity };  // last: to select by

struct GateShape {
  std::int64_t tokens, experts, slots, groups;
  static constexpr std::int64_t kBlock = 64;

  // The CPU needs scratch for rows longer than kStackRow.
  static constexpr std::int64_t kStackRow = 1024, kRowPadding = 64, kRows = 5;

  constexpr std::int64_t blocks() const { return (tokens + kBlock - 1) / kBlock; }
  constexpr std::int64_t segments() const { return blocks() + groups - 1; }
  constexpr std::int64_t scratch_size() const {
    const std::int64_t size = experts > slots ? experts : slots;
    return size <= kStackRow ? 0 : kRows * (size + kRowPadding);
  }
};

template <class C> struct GateWeights {
  Score score;
  bool renormalize;
  C epsilon, scale;

  // Whether weights are the softmax of the slots alone.
  TORCH_ROUTERS_HOST_DEVICE constexpr bool of_slots() const {
    return score == Score::Softmax && renormalize && epsilon == 0;
  }
};

template <class C> struct GateSelection {
  const C* bias;                                        // [experts]; null: none
  std::int64_t expert_groups, kept_groups, group_best;  // expert_groups 0: none

  TORCH_ROUTERS_HOST_DEVICE constexpr bool by_logits() const { return !bias && !expert_groups; }
};

template <class S> struct Gate : GateShape {
  using C = Compute<S>;
  const S* logits;                    // [tokens, experts]
  const bool* valid;                  // [tokens]; null: all are
  const std::int64_t* group_offsets;  // [groups + 1]; null: one group
  const std::int64_t* token_top_k;    // [tokens], in [0, slots]; null: slots
  std::int64_t* indices;              // [tokens, slots], in [-1, experts)
  C* weights;                         // [tokens, slots]
  C* lse;                             // [tokens]; null, as the next: no statistics
  C* partial_sums;                    // [segments, experts]
  std::int64_t* partial_counts;       // [segments, experts]; null: indices only
  std::int64_t* partial_tokens;       // [segments]
  C* scratch;                         // [blocks, scratch_size()], of the CPU; null if that is 0
  bool select;
  GateSelection<C> selection;
  GateWeights<C> weighing;

  TORCH_ROUTERS_HOST_DEVICE constexpr bool weighs() const { return partial_counts; }
};

template <class C> struct GateCombine : GateShape {
  const std::int64_t* group_offsets;
  const C* partial_sums;
  const std::int64_t* partial_counts;
  const std::int64_t* partial_tokens;
  C* score_sums;               // [groups, experts]; null: no statistics
  std::int64_t* counts;        // [groups, experts]
  std::int64_t* group_tokens;  // [groups]
};

template <class S> struct GateBackward : GateShape {
  using C = Compute<S>;
  const C* grad_weights;     // [tokens, slots]; null, as the next two: 0
  const C* grad_lse;         // [tokens]
  const C* grad_score_sums;  // [groups, experts]
  const S* logits;
  const bool* valid;
  const std::int64_t* group_offsets;
  const std::int64_t* indices;
  S* grad_logits;  // [tokens, experts]
  C* scratch;      // as in Gate
  GateWeights<C> weighing;
};

// On the calling thread: blocks or groups [begin, end).
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class S> void gate(const Gate<S>&, std::int64_t begin, std::int64_t end);
  template <class C> void gate(const GateCombine<C>&, std::int64_t begin, std::int64_t end);
  template <class S> void gate(const GateBackward<S>&, std::int64_t begin, std::int64_t end);
)

template <class Params>
void gate_cpu(const Params& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), gate(params, begin, end));
}

// All of it, queued on `stream` (a cudaStream_t) of the current device.
template <class S> void gate_cuda(const Gate<S>&, void* stream);
template <class C> void gate_cuda(const GateCombine<C>&, void* stream);
template <class S> void gate_cuda(const GateBackward<S>&, void* stream);

}  // namespace torch_routers
