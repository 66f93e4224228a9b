// The ReLU-RMSNorm gate (BlockFFN, arXiv 2507.08771): experts whose logit is positive, however many,
// with the normalised logit as weight. With z the logits of a valid token, E experts, g the gain:
//
//   activation  a_e = max(z_e, 0); NaN stays
//   Rms         r = (1/E sum_e a_e^2 + eps)^(-1/2),           h_e = a_e r
//   Centered    m = 1/E sum_e a_e,
//               r = (1/E sum_e (a_e - m)^2 + eps)^(-1/2),     h_e = (a_e - m) r where a_e > 0, else a_e r
//   Simple      r = 1,                                        h_e = a_e
//   weight      y_e = g_e h_e, so that an expert that is not active has the weight 0 in each of them
//   counts[e]   valid tokens with a_e > 0, whatever the gain is
//   gradient    of y: v.  u_e = v_e g_e, where a_e > 0;  B = 1/E sum_e u_e if Centered, else 0;
//               M = 1/E sum_e u_e h_e, 0 if Simple;  dL/dz_e = r (u_e - B - h_e M) where a_e > 0
//               or is NaN, else 0;  dL/dg_e = sum_t v_te h_te
//
// A masked token has weights, r and gradient 0, is counted nowhere, and its logits are never looked
// at. NaN among the logits of a token is NaN in all its weights (Simple: in that weight alone).
//
// All arrays are dense and row-major. Sums over tokens do not depend on threads: tokens come in
// blocks of kBlock with partial results of their own, which are added up in order.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

// Values: those of the operators' argument, in the order of the names in Python.
enum class ReluNorm : std::int64_t { Rms, Centered, Simple };

struct ReluRmsGateShape {
  std::int64_t tokens, experts;
  static constexpr std::int64_t kBlock = 64;

  TORCH_ROUTERS_HOST_DEVICE constexpr std::int64_t blocks() const {
    return (tokens + kBlock - 1) / kBlock;
  }
};

template <class S> struct ReluRmsGate : ReluRmsGateShape {
  using C = Compute<S>;
  const S* logits;               // [tokens, experts]
  const C* gain;                 // [experts]
  const bool* valid;             // [tokens]; null: all are
  C* weights;                    // [tokens, experts]
  C* inverse_rms;                // [tokens]: r
  std::int64_t* partial_counts;  // [blocks, experts]
  C eps;
  ReluNorm norm;
};

template <class S> struct ReluRmsGateBackward : ReluRmsGateShape {
  using C = Compute<S>;
  const C* grad_weights;  // [tokens, experts]
  const S* logits;
  const C* gain;
  const bool* valid;
  S* grad_logits;         // [tokens, experts]
  double* partial_grads;  // [blocks, experts]: of the gain
  C eps;
  ReluNorm norm;
};

// to[e] = the sum of from[block, e] over the blocks, in order.
template <class From, class To> struct ReluRmsGateCombine : ReluRmsGateShape {
  const From* from;
  To* to;
};

// On the calling thread: blocks, of the last one experts [begin, end).
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class S> void relu_rms_gate(const ReluRmsGate<S>&, std::int64_t begin, std::int64_t end);
  template <class S> void relu_rms_gate(const ReluRmsGateBackward<S>&, std::int64_t begin,
                                        std::int64_t end);
  template <class From, class To> void relu_rms_gate(const ReluRmsGateCombine<From, To>&,
                                                     std::int64_t begin, std::int64_t end);
)

template <class Params>
void relu_rms_gate_cpu(const Params& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), relu_rms_gate(params, begin, end));
}

// All of it, queued on `stream` (a cudaStream_t) of the current device.
template <class S> void relu_rms_gate_cuda(const ReluRmsGate<S>&, void* stream);
template <class S> void relu_rms_gate_cuda(const ReluRmsGateBackward<S>&, void* stream);
template <class From, class To>
void relu_rms_gate_cuda(const ReluRmsGateCombine<From, To>&, void* stream);

}  // namespace torch_routers
