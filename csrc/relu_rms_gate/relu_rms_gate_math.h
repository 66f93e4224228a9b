// Formulas of relu_rms_gate_kernel.h shared by CPU and CUDA.
#pragma once

#include "common/score.h"
#include "relu_rms_gate/relu_rms_gate_kernel.h"

namespace torch_routers {

// Here V is a number, or on the CPU a vector of them. The activation; NaN stays.
template <class V> TORCH_ROUTERS_HOST_DEVICE static inline V relu(V z) {
  const V zero{};
  return z <= zero ? zero : z;
}

// Unnamed, for the reason why functions are `static` here: see common/scalar.h.
namespace {

// What normalises a row: its mean, 0 unless it is centred, and its inverse root mean square.
template <class C> struct RowNorm {
  C mean, inverse;

  TORCH_ROUTERS_HOST_DEVICE RowNorm(C mean, C inverse) : mean(mean), inverse(inverse) {}

  // sum(term): the sum over the row of term(a_e).
  template <class Sum>
  TORCH_ROUTERS_HOST_DEVICE RowNorm(ReluNorm norm, C eps, std::int64_t experts, const Sum& sum)
      : mean(0), inverse(1) {
    if (norm == ReluNorm::Simple) return;
    const C size = static_cast<C>(experts);
    if (norm == ReluNorm::Centered) mean = sum([](auto a) { return a; }) / size;
    const C m = mean;
    inverse = 1 / own_sqrt(sum([m](auto a) { return (a - m) * (a - m); }) / size + eps);
  }

  template <class V> TORCH_ROUTERS_HOST_DEVICE V normalized(V a) const {
    const V zero{}, subtracted = zero + mean;
    return (a - (a > zero ? subtracted : zero)) * inverse;
  }

  // The gradient of a logit from u, its h and the means over the row; see relu_rms_gate_kernel.h.
  template <class V>
  TORCH_ROUTERS_HOST_DEVICE V gradient(V a, V u, V h, C mean_u, C mean_uh) const {
    const V zero{}, slope = inverse * (u - mean_u - h * mean_uh);
    return a == zero ? zero : slope;
  }
};

}  // namespace
}  // namespace torch_routers
