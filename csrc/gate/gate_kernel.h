// The gate: from logits and the experts of each token to combine weights, and what losses need of
// the same pass. With x the logits of a valid token, p = softmax(x) and i_j its expert in slot j:
//
//   weight      w_j = p[i_j], or p[i_j] / sum_l p[i_l] if `renormalize`; 0 where i_j = -1
//   statistics  lse = ln sum_e exp x_e         per token
//               score_sums[g, e] = sum_t p_te  over the valid tokens of group g
//               counts[g, e]                   slots of expert e, over the same tokens
//               group_tokens[g]                their number
//   gradient    dL/dx_e = p_e (s_e + h_e - sum_f (s_f + h_f) p_f + l)   not renormalised
//               dL/dx_e = p_e (s_e - sum_f s_f p_f + l) + h_e           renormalised
//               s, l: gradients of score_sums and lse; v_j: of w_j;
//               h_e = sum of v_j, or of w_j (v_j - sum_l v_l w_l), over the slots j with i_j = e
//
// `select`: the i_j are the experts of the largest logits, largest first, and are written; else
// they are read. Order of logits: common/score.h. A masked token has indices -1, weights, lse and
// gradient 0, is counted nowhere, and its logits are never looked at. A row whose logits are all
// -infinity has weights, probabilities and gradient 0.
//
// Callers check that indices and offsets fit; the CUDA kernels, for which that would cost a
// synchronisation, guard themselves: the weight of an index out of range is NaN there.
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

namespace torch_routers {

struct GateShape {
  std::int64_t tokens, experts, slots, groups;
  static constexpr std::int64_t kBlock = 64;

  constexpr std::int64_t blocks() const { return (tokens + kBlock - 1) / kBlock; }
  constexpr std::int64_t segments() const { return blocks() + groups - 1; }
};

template <class T> struct Gate : GateShape {
  const T* logits;                    // [tokens, experts]
  const bool* valid;                  // [tokens]; null: all are
  const std::int64_t* group_offsets;  // [groups + 1]; null: one group
  std::int64_t* indices;              // [tokens, slots], in [-1, experts)
  T* weights;                         // [tokens, slots]
  T* lse;                             // [tokens]; null, as the next two: no statistics
  T* scores;                          // [blocks, experts], scratch of the CPU
  T* partial_sums;                    // [segments, experts]
  std::int64_t* partial_counts;       // [segments, experts]
  bool select, renormalize;
};

template <class T> struct GateCombine : GateShape {
  const bool* valid;
  const std::int64_t* group_offsets;
  const T* partial_sums;
  const std::int64_t* partial_counts;
  T* score_sums;               // [groups, experts]; null: no statistics
  std::int64_t* counts;        // [groups, experts]
  std::int64_t* group_tokens;  // [groups]
};

template <class T> struct GateBackward : GateShape {
  const T* grad_weights;     // [tokens, slots]; null, as the next two: 0
  const T* grad_lse;         // [tokens]
  const T* grad_score_sums;  // [groups, experts]
  const T* logits;
  const bool* valid;
  const std::int64_t* group_offsets;
  const std::int64_t* indices;
  T* grad_logits;  // [tokens, experts]
  bool renormalize;
};

// On the calling thread: blocks, groups or tokens [begin, end).
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T> void gate(const Gate<T>&, std::int64_t begin, std::int64_t end);
  template <class T> void gate(const GateCombine<T>&, std::int64_t begin, std::int64_t end);
  template <class T> void gate(const GateBackward<T>&, std::int64_t begin, std::int64_t end);
)

template <class Params>
void gate_cpu(const Params& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), gate(params, begin, end));
}

// All of it, queued on `stream` (a cudaStream_t) of the current device.
template <class T> void gate_cuda(const Gate<T>&, void* stream);
template <class T> void gate_cuda(const GateCombine<T>&, void* stream);
template <class T> void gate_cuda(const GateBackward<T>&, void* stream);

}  // namespace torch_routers
