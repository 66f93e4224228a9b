// From logits to weights of as many experts as a token needs: the most probable ones up to a sum of
// probabilities, or all of them where their entropy says that the router cannot tell. Per token, with
// E experts, p = softmax(z), and p' = p + epsilon:
//
//   H  = (1 - sum p'^q) / (1 - E^(1-q))           Tsallis, divided by its largest value
//      = -sum p' ln p' / ln E                     q = 1: Shannon
//      = ln(sum p'^q + 1e-10) / ((1 - q) ln E)    Renyi
//   experts in descending order of z, the lower index first of equals; c_j the sum of the first j
//   kept: those whose c_j <= top_p (Below); whose c_{j-1} < top_p (Reaching), or <= top_p (Exceeding);
//         the first keep_top_k in any case; all if soft and H > threshold
//   w  = p of those kept, 0 of others; `renormalize`: divided by its sum
//
// For 1e-4 <= |q - 1| < 1e-2 the 1 of the numerator is sum p', without which H would diverge, and
// below it is Shannon's. Where it is 1, it is sum p' - E epsilon, p having the sum 1: every H comes
// from the sum of x u(x), u(x) = (1 - x^(q - 1)) / (q - 1), whose digits do not cancel. With one expert H = 0. A masked token keeps none, and its H is 0. A NaN
// among the logits makes p and H NaN, of which the first keep_top_k are kept. Where all logits are
// -infinity, weights and H are 0.
//
//   dz = p (kept g - sum kept p g)  +  gH p (d - sum p d),    d = dH / dp
//   renormalised, the first term is w (g - sum w g)
//
// All in T, save what is computed once per token from a sum. What is kept is constant.
#pragma once

#include <cstdint>

#include "common/crossing.h"
#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

enum class Entropy : std::int64_t { Tsallis, Renyi };

struct EntropyRule {
  Entropy entropy;
  double q, epsilon;
  bool soft;  // whether `threshold` is looked at
  double threshold, top_p;
  Crossing crossing;
  std::int64_t keep_top_k;
  bool renormalize;
};

template <class T> struct EntropyGateInputs {
  std::int64_t tokens, experts;
  const T* logits;    // [tokens, experts]
  const bool* valid;  // [tokens]; null: all are
  EntropyRule rule;
};

template <class T> struct EntropyGate : EntropyGateInputs<T> {
  T* weights;  // [tokens, experts]
  T* entropy;  // [tokens]
};

template <class T> struct EntropyGateBackward : EntropyGateInputs<T> {
  const T* weights;       // [tokens, experts], of the forward: those above 0 are kept
  const T* grad_weights;  // [tokens, experts]
  const T* grad_entropy;  // [tokens]
  T* grad_logits;         // [tokens, experts]
};

// Tokens [begin, end) on the calling thread.
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T> void entropy_gate(const EntropyGate<T>&, std::int64_t begin, std::int64_t end);
  template <class T> void entropy_gate(const EntropyGateBackward<T>&, std::int64_t begin,
                                       std::int64_t end);
)

template <class Params>
void entropy_gate_cpu(const Params& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), entropy_gate(params, begin, end));
}

// All tokens, queued on `stream` (a cudaStream_t) of the current device.
template <class T> void entropy_gate_cuda(const EntropyGate<T>&, void* stream);
template <class T> void entropy_gate_cuda(const EntropyGateBackward<T>&, void* stream);

}  // namespace torch_routers
