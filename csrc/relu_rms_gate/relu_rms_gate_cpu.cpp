#include "common/row.h"
#include "relu_rms_gate/relu_rms_gate_kernel.h"
#include "relu_rms_gate/relu_rms_gate_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

// Of the last block, what is there.
int64_t end_of_block(const ReluRmsGateShape& p, int64_t block) {
  const int64_t end = (block + 1) * p.kBlock;
  return end < p.tokens ? end : p.tokens;
}

template <class Params>
RowNorm<typename Params::C> row_norm(const Params& p, int64_t token) {
  using C = typename Params::C;
  const auto* z = p.logits + token * p.experts;
  return {p.norm, p.eps, p.experts, [&](const auto& term) {
            return sum_row<C>(p.experts, [&](int64_t e) { return term(relu<C>(load(z[e]))); });
          }};
}

template <class S> void token(const ReluRmsGate<S>& p, int64_t t, int64_t* counts) {
  using C = Compute<S>;
  const S* z = p.logits + t * p.experts;
  C* y = p.weights + t * p.experts;
  if (p.valid && !p.valid[t]) {
    for (int64_t e = 0; e < p.experts; ++e) y[e] = 0;
    p.inverse_rms[t] = 0;
    return;
  }
  const RowNorm<C> norm = row_norm(p, t);
  p.inverse_rms[t] = norm.inverse;
  for (int64_t e = 0; e < p.experts; ++e) {
    const C a = relu<C>(load(z[e]));
    y[e] = norm.normalized(a) * p.gain[e];
  }
  for (int64_t e = 0; e < p.experts; ++e) counts[e] += C{load(z[e])} > 0;
}

template <class S> void token(const ReluRmsGateBackward<S>& p, int64_t t, double* grads) {
  using C = Compute<S>;
  const int64_t row = t * p.experts;
  const S* z = p.logits + row;
  const C* v = p.grad_weights + row;
  S* grad = p.grad_logits + row;
  if (p.valid && !p.valid[t]) {
    for (int64_t e = 0; e < p.experts; ++e) store(grad + e, C{0});
    return;
  }
  const RowNorm<C> norm = row_norm(p, t);
  const C size = static_cast<C>(p.experts);
  C mean_u = 0, mean_uh = 0;
  if (p.norm == ReluNorm::Centered)
    mean_u = sum_row<C>(p.experts,
                        [&](int64_t e) { return C{load(z[e])} <= 0 ? C{0} : v[e] * p.gain[e]; }) /
             size;
  if (p.norm != ReluNorm::Simple)
    mean_uh = sum_row<C>(p.experts,
                         [&](int64_t e) {
                           return v[e] * p.gain[e] * norm.normalized(relu<C>(load(z[e])));
                         }) /
              size;
  for (int64_t e = 0; e < p.experts; ++e) {
    const C a = relu<C>(load(z[e])), h = norm.normalized(a);
    store(grad + e, norm.gradient(a, v[e] * p.gain[e], h, mean_u, mean_uh));
    grads[e] += static_cast<double>(v[e]) * static_cast<double>(h);
  }
}

template <class Params, class Element>
void block_of_tokens(const Params& p, int64_t block, Element* partial) {
  partial += block * p.experts;
  for (int64_t e = 0; e < p.experts; ++e) partial[e] = 0;
  for (int64_t t = block * p.kBlock; t < end_of_block(p, block); ++t) token(p, t, partial);
}

}  // namespace

template <class S> void relu_rms_gate(const ReluRmsGate<S>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) block_of_tokens(p, block, p.partial_counts);
}

template <class S>
void relu_rms_gate(const ReluRmsGateBackward<S>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) block_of_tokens(p, block, p.partial_grads);
}

template <class From, class To>
void relu_rms_gate(const ReluRmsGateCombine<From, To>& p, int64_t begin, int64_t end) {
  for (int64_t e = begin; e < end; ++e) {
    From sum = 0;
    for (int64_t block = 0; block < p.blocks(); ++block) sum += p.from[block * p.experts + e];
    p.to[e] = static_cast<To>(sum);
  }
}

#define TORCH_ROUTERS_INSTANTIATE(S)                                    \
  template void relu_rms_gate(const ReluRmsGate<S>&, int64_t, int64_t); \
  template void relu_rms_gate(const ReluRmsGateBackward<S>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)
template void relu_rms_gate(const ReluRmsGateCombine<int64_t, int64_t>&, int64_t, int64_t);
template void relu_rms_gate(const ReluRmsGateCombine<double, float>&, int64_t, int64_t);
template void relu_rms_gate(const ReluRmsGateCombine<double, double>&, int64_t, int64_t);

}  // namespace torch_routers::TORCH_ROUTERS_ISA
