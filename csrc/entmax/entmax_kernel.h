// Entmax: probabilities that may be zero. With x the logits of a valid token and a = alpha - 1:
//
//   weight    p_i = (a x_i - tau)_+^(1 / a), tau such that sum_i p_i = 1; softmax where a < 1e-4
//   counts    counts[e]: tokens with p_e != 0
//   gradient  dL/dx_i = s_i (v_i - sum_j s_j v_j / sum_j s_j), s_i = p_i^(1 - a), 0 where p_i = 0
//             dL/dalpha = -sum over tokens and experts of r_i dL/dx_i,
//             r_i = (1 - e^y (1 - y)) / a^2 with y = a ln p_i, which for a -> 0 is (ln p_i)^2 / 2
//             v_i: gradient of p_i
//
// (A change of alpha acts like one of the logits by -r. It is the known derivative,
// (p_i - q_i) / a^2 + (h_i - q_i sum_j h_j) / a with q = s / sum s and h = -p ln p, without the
// difference of p and q, of which nothing is left where a is small.)
//
// A masked token has weights and gradient 0, is counted nowhere, and its logits do not matter. So it
// is with a row whose logits are all -infinity. A row with NaN or infinity has NaN weights, all of
// which count. An alpha that is not a finite number of at least 1 makes NaN of all rows; callers
// check it where that needs no synchronisation.
//
// All arrays are dense and row-major. Sums over tokens do not depend on threads: tokens come in
// blocks of kBlock, with partial results of their own.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

struct EntmaxShape {
  std::int64_t tokens, experts;
  static constexpr std::int64_t kBlock = 64;

  TORCH_ROUTERS_HOST_DEVICE constexpr std::int64_t blocks() const {
    return (tokens + kBlock - 1) / kBlock;
  }
};

template <class C> struct EntmaxAlpha {
  const C* learned;  // null: it is `fixed`
  double fixed;

  TORCH_ROUTERS_HOST_DEVICE double value() const { return learned ? double{*learned} : fixed; }
};

template <class S> struct Entmax : EntmaxShape {
  using C = Compute<S>;
  const S* logits;    // [tokens, experts]
  const bool* valid;  // [tokens]; null: all are
  EntmaxAlpha<C> alpha;
  C* weights;                    // [tokens, experts]
  std::int64_t* partial_counts;  // [blocks, experts]
};

struct EntmaxCounts : EntmaxShape {
  const std::int64_t* partial_counts;
  std::int64_t* counts;  // [experts]
};

template <class C> struct EntmaxBackward : EntmaxShape {
  const C* grad_weights;  // [tokens, experts], as the next
  const C* weights;
  EntmaxAlpha<C> alpha;
  C* grad_logits;
  double* partial_alpha;  // [blocks]; null if alpha is not learned
};

template <class C> struct EntmaxAlphaSum : EntmaxShape {
  const double* partial_alpha;
  C* grad_alpha;  // scalar
};

// On the calling thread: blocks [begin, end); of counts experts; of the sum all, whatever the range.
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class S> void entmax(const Entmax<S>&, std::int64_t begin, std::int64_t end);
  void entmax(const EntmaxCounts&, std::int64_t begin, std::int64_t end);
  template <class C> void entmax(const EntmaxBackward<C>&, std::int64_t begin, std::int64_t end);
  template <class C> void entmax(const EntmaxAlphaSum<C>&, std::int64_t begin, std::int64_t end);
)

template <class Params>
void entmax_cpu(const Params& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), entmax(params, begin, end));
}

// All of it, queued on `stream` (a cudaStream_t) of the current device.
template <class S> void entmax_cuda(const Entmax<S>&, void* stream);
void entmax_cuda(const EntmaxCounts&, void* stream);
template <class C> void entmax_cuda(const EntmaxBackward<C>&, void* stream);
template <class C> void entmax_cuda(const EntmaxAlphaSum<C>&, void* stream);

}  // namespace torch_routers
