// One warp per token, one thread block per block of tokens: the block alone writes its partial sums,
// each expert's by one thread in the order of tokens. Rows are read again wherever they are needed,
// from the caches. Not run on a GPU yet.
#include "common/cuda.cuh"
#include "relu_rms_gate/relu_rms_gate_kernel.h"
#include "relu_rms_gate/relu_rms_gate_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The tokens of a thread block.
struct Tokens {
  int64_t first, past;
  __device__ explicit Tokens(const ReluRmsGateShape& p)
      : first(int64_t{blockIdx.x} * p.kBlock),
        past(first + p.kBlock < p.tokens ? first + p.kBlock : p.tokens) {}
};

template <class Params> __device__ bool is_masked(const Params& p, int64_t token) {
  return p.valid && !p.valid[token];
}

template <class C, class Term> __device__ C sum_of_row(int64_t experts, const Term& term) {
  C sum = 0;
  for (int64_t e = lane(); e < experts; e += kWarp) sum += term(e);
  return warp_sum(sum);
}

template <class S, class C>
__device__ RowNorm<C> row_norm(const S* z, int64_t experts, ReluNorm norm, C eps) {
  return {norm, eps, experts, [&](const auto& term) {
            return sum_of_row<C>(experts, [&](int64_t e) { return term(relu<C>(load(z[e]))); });
          }};
}

template <class S> __global__ void __launch_bounds__(kThreads) weigh_tokens(ReluRmsGate<S> p) {
  using C = Compute<S>;
  const Tokens tokens(p);
  for (int64_t t = tokens.first + warp(); t < tokens.past; t += kWarps) {
    const S* z = p.logits + t * p.experts;
    C* y = p.weights + t * p.experts;
    if (is_masked(p, t)) {
      for (int64_t e = lane(); e < p.experts; e += kWarp) y[e] = 0;
      if (lane() == 0) p.inverse_rms[t] = 0;
      continue;
    }
    const RowNorm<C> norm = row_norm(z, p.experts, p.norm, p.eps);
    for (int64_t e = lane(); e < p.experts; e += kWarp)
      y[e] = norm.normalized(relu<C>(load(z[e]))) * p.gain[e];
    if (lane() == 0) p.inverse_rms[t] = norm.inverse;
  }
  for (int64_t e = threadIdx.x; e < p.experts; e += kThreads) {
    int64_t count = 0;
    for (int64_t t = tokens.first; t < tokens.past; ++t)
      count += !is_masked(p, t) && C{load(p.logits[t * p.experts + e])} > 0;
    p.partial_counts[blockIdx.x * p.experts + e] = count;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) weigh_tokens_backward(ReluRmsGateBackward<S> p) {
  using C = Compute<S>;
  __shared__ C means[ReluRmsGateShape::kBlock];
  __shared__ C inverses[ReluRmsGateShape::kBlock];
  const Tokens tokens(p);
  const C size = static_cast<C>(p.experts);
  // The compiler may load those of masked tokens, and beyond the last one, before it asks.
  for (int i = threadIdx.x; i < ReluRmsGateShape::kBlock; i += kThreads) means[i] = inverses[i] = 0;
  __syncthreads();
  for (int64_t t = tokens.first + warp(); t < tokens.past; t += kWarps) {
    const int64_t row = t * p.experts;
    const S* z = p.logits + row;
    const C* v = p.grad_weights + row;
    if (is_masked(p, t)) {
      for (int64_t e = lane(); e < p.experts; e += kWarp) store(p.grad_logits + row + e, C{0});
      continue;
    }
    const RowNorm<C> norm = row_norm(z, p.experts, p.norm, p.eps);
    C mean_u = 0, mean_uh = 0;
    if (p.norm == ReluNorm::Centered)
      mean_u =
          sum_of_row<C>(p.experts,
                        [&](int64_t e) { return C{load(z[e])} <= 0 ? C{0} : v[e] * p.gain[e]; }) /
          size;
    if (p.norm != ReluNorm::Simple)
      mean_uh = sum_of_row<C>(p.experts,
                              [&](int64_t e) {
                                return v[e] * p.gain[e] * norm.normalized(relu<C>(load(z[e])));
                              }) /
                size;
    for (int64_t e = lane(); e < p.experts; e += kWarp) {
      const C a = relu<C>(load(z[e]));
      store(p.grad_logits + row + e,
            norm.gradient(a, v[e] * p.gain[e], norm.normalized(a), mean_u, mean_uh));
    }
    if (lane() == 0) {
      means[t - tokens.first] = norm.mean;
      inverses[t - tokens.first] = norm.inverse;
    }
  }
  __syncthreads();  // the norms of all tokens are there
  for (int64_t e = threadIdx.x; e < p.experts; e += kThreads) {
    double sum = 0;
    for (int64_t t = tokens.first; t < tokens.past; ++t) {
      if (is_masked(p, t)) continue;
      const int64_t at = t * p.experts + e;
      const RowNorm<C> norm(means[t - tokens.first], inverses[t - tokens.first]);
      const C h = norm.normalized(relu<C>(load(p.logits[at])));
      sum += static_cast<double>(p.grad_weights[at]) * static_cast<double>(h);
    }
    p.partial_grads[blockIdx.x * p.experts + e] = sum;
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) add_blocks(ReluRmsGateCombine<From, To> p) {
  const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (e >= p.experts) return;
  From sum = 0;
  for (int64_t block = 0; block < p.blocks(); ++block) sum += p.from[block * p.experts + e];
  p.to[e] = static_cast<To>(sum);
}

constexpr auto kName = "relu_rms_gate";

}  // namespace

template <class S> void relu_rms_gate_cuda(const ReluRmsGate<S>& p, void* stream) {
  launch(kName, weigh_tokens<S>, p.blocks(), kThreads, stream, p);
}
template <class S> void relu_rms_gate_cuda(const ReluRmsGateBackward<S>& p, void* stream) {
  launch(kName, weigh_tokens_backward<S>, p.blocks(), kThreads, stream, p);
}
template <class From, class To>
void relu_rms_gate_cuda(const ReluRmsGateCombine<From, To>& p, void* stream) {
  launch(kName, add_blocks<From, To>, (p.experts + kThreads - 1) / kThreads, kThreads, stream, p);
}

#define TORCH_ROUTERS_INSTANTIATE(S)                             \
  template void relu_rms_gate_cuda(const ReluRmsGate<S>&, void*); \
  template void relu_rms_gate_cuda(const ReluRmsGateBackward<S>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)
template void relu_rms_gate_cuda(const ReluRmsGateCombine<std::int64_t, std::int64_t>&, void*);
template void relu_rms_gate_cuda(const ReluRmsGateCombine<double, float>&, void*);
template void relu_rms_gate_cuda(const ReluRmsGateCombine<double, double>&, void*);

}  // namespace torch_routers
