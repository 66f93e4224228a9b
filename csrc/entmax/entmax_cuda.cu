// A thread block per block of tokens, a warp per token: lane l has experts l, l + 32, ... in all
// passes over a row, which is kept where its weights will be. Not run on a GPU yet.
#include "common/cuda.cuh"
#include "entmax/entmax_kernel.h"
#include "entmax/entmax_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr auto kName = "entmax";

// ---- parts -------------------------------------------------------------------------------------

// term(e) of the experts of a row, added up, in all lanes.
template <class T, class Term> __device__ T row_sum(int64_t experts, const Term& term) {
  T sum = 0;
  for (int64_t e = lane(); e < experts; e += kWarp) sum += term(e);
  return warp_sum(sum);
}

template <class T> __device__ T not_a_number() { return static_cast<T>(__builtin_nan("")); }

// Logits in x become weights.
template <EntmaxKind kKind, class C> __device__ void entmax_row(double alpha, int64_t experts,
                                                                C* x) {
  using W = EntmaxWork<kKind, C>;
  const auto method = EntmaxMethod<kKind, C>::of(alpha);
  C max = kLowestLogit<C>;
  bool is_number = true;
  for (int64_t e = lane(); e < experts; e += kWarp) {
    max = x[e] > max ? x[e] : max;
    is_number = is_number && x[e] < -kLowestLogit<C>;
  }
  max = warp_max(max);
  is_number = !__any_sync(kAllLanes, !is_number);
  const bool has_experts = max != kLowestLogit<C>;
  const W origin = has_experts ? max : C{0};
  const auto distance = [&](W top, int64_t e) { return top + (x[e] - origin) * method.factor; };
  const auto sums = [&](W top) {
    EntmaxSums<W> sum{};
    for (int64_t e = lane(); e < experts; e += kWarp)
      sum = sum + entmax_term(method, distance(top, e));
    return EntmaxSums<W>{warp_sum(sum.count), warp_sum(sum.first), warp_sum(sum.second)};
  };

  W top = method.kFirstTop;
  const bool is_active = has_experts && is_number;
  if constexpr (kKind == EntmaxKind::General) {
    auto search = EntmaxSearch<C>::start(experts, is_active);
    for (int turn = 0; search.is_active; ++turn) search.advance(method, sums(search.top), turn);
    top = search.top;
  } else if constexpr (method.kIterates) {
    for (bool goes_on = is_active; goes_on;) {
      const auto step = entmax_step<kKind>(top, sums(top));
      top -= step.size;
      goes_on = step.is_last == 0;
    }
  }
  const W sum = row_sum<W>(experts, [&](int64_t e) { return method.weight(distance(top, e)); });
  const W scale = !is_number ? not_a_number<W>() : sum == 0 ? W{0} : 1 / sum;
  for (int64_t e = lane(); e < experts; e += kWarp)
    x[e] = static_cast<C>(method.weight(distance(top, e)) * scale);
}

// Invalid as kKind: that of an alpha which is known only here.
template <EntmaxKind kKind, class C> __device__ void weigh(double alpha, int64_t experts, C* x) {
  if constexpr (kKind != EntmaxKind::Invalid) return entmax_row<kKind>(alpha, experts, x);
  switch (entmax_kind(alpha)) {
    case EntmaxKind::Softmax: return entmax_row<EntmaxKind::Softmax>(alpha, experts, x);
    case EntmaxKind::Root: return entmax_row<EntmaxKind::Root>(alpha, experts, x);
    case EntmaxKind::Simplex: return entmax_row<EntmaxKind::Simplex>(alpha, experts, x);
    case EntmaxKind::General: return entmax_row<EntmaxKind::General>(alpha, experts, x);
    case EntmaxKind::Invalid:
      for (int64_t e = lane(); e < experts; e += kWarp) x[e] = not_a_number<C>();
  }
}

template <class C> __device__ C slope(EntmaxKind kind, double alpha, C weight) {
  return kind == EntmaxKind::Softmax   ? entmax_slope<EntmaxKind::Softmax>(alpha, weight)
         : kind == EntmaxKind::Root    ? entmax_slope<EntmaxKind::Root>(alpha, weight)
         : kind == EntmaxKind::Simplex ? entmax_slope<EntmaxKind::Simplex>(alpha, weight)
                                       : entmax_slope<EntmaxKind::General>(alpha, weight);
}

template <class Params> __device__ int64_t past_block(const Params& p) {
  const int64_t past = (int64_t{blockIdx.x} + 1) * p.kBlock;
  return past < p.tokens ? past : p.tokens;
}

// ---- kernels -----------------------------------------------------------------------------------

template <EntmaxKind kKind, class S>
__global__ void __launch_bounds__(kThreads, 1) forward(Entmax<S> p) {
  using C = Compute<S>;
  const double alpha = p.alpha.value();
  const int64_t first = int64_t{blockIdx.x} * p.kBlock, past = past_block(p);
  for (int64_t t = first + warp(); t < past; t += kWarps) {
    const bool masked = p.valid && !p.valid[t];
    C* weights = p.weights + t * p.experts;
    for (int64_t e = lane(); e < p.experts; e += kWarp)
      weights[e] = masked ? C{0} : load(p.logits[t * p.experts + e]);
    if (!masked) weigh<kKind>(alpha, p.experts, weights);
  }
  __syncthreads();  // the weights of the block are there
  for (int64_t e = threadIdx.x; e < p.experts; e += kThreads) {
    int64_t active = 0;
    for (int64_t t = first; t < past; ++t) active += p.weights[t * p.experts + e] != 0;
    p.partial_counts[int64_t{blockIdx.x} * p.experts + e] = active;
  }
}

__global__ void __launch_bounds__(kThreads) add_counts(EntmaxCounts p) {
  const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (e >= p.experts) return;
  int64_t count = 0;
  for (int64_t block = 0; block < p.blocks(); ++block)
    count += p.partial_counts[block * p.experts + e];
  p.counts[e] = count;
}

template <class C> __global__ void __launch_bounds__(kThreads) backward(EntmaxBackward<C> p) {
  __shared__ double parts[kWarps];
  const double alpha = p.alpha.value();
  const EntmaxKind kind = entmax_kind(alpha);
  double of_alpha = 0;
  for (int64_t t = int64_t{blockIdx.x} * p.kBlock + warp(); t < past_block(p); t += kWarps) {
    const C* w = p.weights + t * p.experts;
    const C* v = p.grad_weights + t * p.experts;
    C* dx = p.grad_logits + t * p.experts;
    C sum = 0, dot = 0;
    for (int64_t e = lane(); e < p.experts; e += kWarp) {
      const C s = dx[e] = slope(kind, alpha, w[e]);
      sum += s;
      dot += s == 0 ? C{0} : s * v[e];
    }
    sum = warp_sum(sum);
    dot = warp_sum(dot);
    const C mean = sum == 0 ? C{0} : dot / sum;
    for (int64_t e = lane(); e < p.experts; e += kWarp) {
      dx[e] = dx[e] == 0 ? C{0} : dx[e] * (v[e] - mean);
      if (p.partial_alpha && w[e] != 0) of_alpha -= entmax_alpha_shift(alpha, w[e]) * dx[e];
    }
  }
  if (!p.partial_alpha) return;
  of_alpha = warp_sum(of_alpha);
  if (lane() == 0) parts[warp()] = of_alpha;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) of_alpha += parts[w];
  p.partial_alpha[blockIdx.x] = of_alpha;
}

// A single warp: blocks are few.
template <class C> __global__ void __launch_bounds__(kWarp) add_alpha(EntmaxAlphaSum<C> p) {
  const double sum = row_sum<double>(p.blocks(), [&](int64_t b) { return p.partial_alpha[b]; });
  if (lane() == 0) *p.grad_alpha = static_cast<C>(sum);
}

// What is known before the launch is not asked for in the kernel.
template <class S> auto forward_of(const EntmaxAlpha<Compute<S>>& alpha) {
  switch (alpha.learned ? EntmaxKind::Invalid : entmax_kind(alpha.fixed)) {
    case EntmaxKind::Softmax: return forward<EntmaxKind::Softmax, S>;
    case EntmaxKind::Root: return forward<EntmaxKind::Root, S>;
    case EntmaxKind::Simplex: return forward<EntmaxKind::Simplex, S>;
    case EntmaxKind::General: return forward<EntmaxKind::General, S>;
    default: return forward<EntmaxKind::Invalid, S>;
  }
}

}  // namespace

template <class S> void entmax_cuda(const Entmax<S>& p, void* stream) {
  launch(kName, forward_of<S>(p.alpha), p.blocks(), kThreads, stream, p);
}
void entmax_cuda(const EntmaxCounts& p, void* stream) {
  launch(kName, add_counts, (p.experts + kThreads - 1) / kThreads, kThreads, stream, p);
}
template <class C> void entmax_cuda(const EntmaxBackward<C>& p, void* stream) {
  launch(kName, backward<C>, p.blocks(), kThreads, stream, p);
}
template <class C> void entmax_cuda(const EntmaxAlphaSum<C>& p, void* stream) {
  launch(kName, add_alpha<C>, 1, kWarp, stream, p);
}

#define TORCH_ROUTERS_INSTANTIATE(S) template void entmax_cuda(const Entmax<S>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)
#define TORCH_ROUTERS_INSTANTIATE_COMPUTE(C)                  \
  template void entmax_cuda(const EntmaxBackward<C>&, void*); \
  template void entmax_cuda(const EntmaxAlphaSum<C>&, void*);
TORCH_ROUTERS_INSTANTIATE_COMPUTE(float)
TORCH_ROUTERS_INSTANTIATE_COMPUTE(double)

}  // namespace torch_routers
