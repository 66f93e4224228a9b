// One thread block per block of tokens, one for everything that has no tokens, and a thread per
// element of the gradients. Not run on a GPU yet.
#include "common/cuda.cuh"
#include "router_losses/router_losses_kernel.h"
#include "router_losses/router_losses_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// ---- parts -------------------------------------------------------------------------------------

// The sum over the threads of the block, in all of them.
__device__ double block_sum(double value, double (&parts)[kWarps]) {
  value = warp_sum(value);
  if (lane() == 0) parts[warp()] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  __syncthreads();  // the parts are read
  return sum;
}

template <class Term>
__device__ double block_sum(int64_t size, double (&parts)[kWarps], const Term& term) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) sum += term(i);
  return block_sum(sum, parts);
}

template <class Term> __device__ double warp_sum_of(int64_t size, const Term& term) {
  double sum = 0;
  for (int64_t i = lane(); i < size; i += kWarp) sum += term(i);
  return warp_sum(sum);
}

// What is known before the balance loss: the tokens, the groups that have any, the importance loss.
struct Common {
  double tokens, groups;
  Importance importance;
};

template <class T> __device__ Common common(const RouterLosses<T>& p, double (&parts)[kWarps]) {
  const double tokens =
      block_sum(p.groups, parts, [&](int64_t g) { return static_cast<double>(p.group_tokens[g]); });
  const double groups =
      block_sum(p.groups, parts, [&](int64_t g) { return p.group_tokens[g] > 0 ? 1.0 : 0.0; });
  double mean = 0, deviations = 0;
  if (p.importance) {
    mean = block_sum(p.experts, parts, [&](int64_t e) { return score_sum(p, e); }) /
           static_cast<double>(p.experts);
    deviations = block_sum(p.experts, parts, [&](int64_t e) {
      const double deviation = score_sum(p, e) - mean;
      return deviation * deviation;
    });
  }
  return {tokens, groups, Importance(p, mean, deviations)};
}

// What the sum over e of c_e s_e of a set is multiplied by to become its part of the balance loss.
template <class T>
__device__ double balance_scale(const RouterLosses<T>& p, int64_t set, const Common& all) {
  const double slots =
      warp_sum_of(p.experts, [&](int64_t e) { return sum_of_set(p, p.counts, set, e); });
  const double tokens = p.per_group ? static_cast<double>(p.group_tokens[set]) : all.tokens;
  const double sets = p.per_group ? at_least_one(all.groups) : 1;
  return static_cast<double>(p.experts) / (balance_divisor(p, tokens, slots) * sets);
}

// The balance loss; a warp takes every eighth set.
template <class T>
__device__ double balance(const RouterLosses<T>& p, const Common& all, double (&parts)[kWarps]) {
  double loss = 0;
  for (int64_t set = warp(); set < p.sets(); set += kWarps) {
    const double dot = warp_sum_of(p.experts, [&](int64_t e) {
      return sum_of_set(p, p.counts, set, e) * sum_of_set(p, p.score_sums, set, e);
    });
    loss += balance_scale(p, set, all) * dot;
  }
  return block_sum(lane() == 0 ? loss : 0.0, parts);
}

// ---- kernels -----------------------------------------------------------------------------------

template <class T> __global__ void __launch_bounds__(kThreads) squares(LseSquares<T> p) {
  __shared__ double parts[kWarps];
  const int64_t first = int64_t{blockIdx.x} * p.kBlock, left = p.tokens - first;
  const double sum = block_sum(left < p.kBlock ? left : p.kBlock, parts,
                               [&](int64_t t) { return square_of_lse(p.lse[first + t]); });
  if (threadIdx.x == 0) p.squares[blockIdx.x] = sum;
}

template <class T> __global__ void __launch_bounds__(kThreads, 1) losses(RouterLosses<T> p) {
  __shared__ double parts[kWarps];
  const Common all = common(p, parts);
  const double of_balance = p.counts ? balance(p, all, parts) : 0;
  double z = 0;
  if (p.squares)
    z = block_sum(p.blocks(), parts, [&](int64_t block) { return p.squares[block]; });
  else if (p.lse)
    z = block_sum(p.tokens, parts, [&](int64_t t) { return square_of_lse(p.lse[t]); });
  if (threadIdx.x == 0)
    write_losses(p, of_balance, z / at_least_one(all.tokens),
                 p.importance ? all.importance.value() : 0);
}

template <class T> __global__ void __launch_bounds__(kThreads, 1) slopes(RouterLosses<T> p) {
  __shared__ double parts[kWarps];
  const Common all = common(p, parts);
  if (threadIdx.x == 0) *p.lse_slope = 2 * p.z_weight / at_least_one(all.tokens);
  for (int64_t set = warp(); p.score_sums && set < p.sets(); set += kWarps) {
    const double scale = p.counts ? p.balance_weight * balance_scale(p, set, all) : 0;
    for (int64_t first = 0; first < p.experts; first += kWarp)  // the same turns for all lanes
      if (const int64_t e = first + lane(); e < p.experts)
        p.slopes[set * p.experts + e] = p.counts ? scale * sum_of_set(p, p.counts, set, e) : 0;
  }
  if (!p.importance) return;
  __syncthreads();  // the slopes of other warps are there
  for (int64_t e = threadIdx.x; e < p.experts; e += kThreads) {
    const double slope = p.importance_weight * all.importance.slope(score_sum(p, e), p.experts);
    for (int64_t set = 0; set < p.sets(); ++set) p.slopes[set * p.experts + e] += slope;
  }
}

template <class T> __global__ void __launch_bounds__(kThreads) backward(RouterLossesBackward<T> p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t tokens = p.lse ? p.tokens : 0, score = i - tokens;
  const double grad = *p.grad_total;
  if (i < tokens)
    p.grad_lse[i] = static_cast<T>(grad * slope_of_lse(*p.lse_slope, p.lse[i]));
  else if (p.grad_score_sums && score < p.groups * p.experts)
    p.grad_score_sums[score] =
        static_cast<T>(grad * p.slopes[p.per_group ? score : score % p.experts]);
}

constexpr auto kName = "router_losses";

}  // namespace

template <class T> void router_losses_cuda(const LseSquares<T>& p, void* stream) {
  launch(kName, squares<T>, p.blocks(), kThreads, stream, p);
}
template <class T> void router_losses_cuda(const RouterLosses<T>& p, void* stream) {
  launch(kName, p.total ? losses<T> : slopes<T>, 1, kThreads, stream, p);
}
template <class T> void router_losses_cuda(const RouterLossesBackward<T>& p, void* stream) {
  const int64_t tokens = p.lse ? p.tokens : 0;
  const int64_t elements = tokens + (p.grad_score_sums ? p.groups * p.experts : 0);
  launch(kName, backward<T>, (elements + kThreads - 1) / kThreads, kThreads, stream, p);
}

#define TORCH_ROUTERS_INSTANTIATE(T)                              \
  template void router_losses_cuda(const LseSquares<T>&, void*);   \
  template void router_losses_cuda(const RouterLosses<T>&, void*); \
  template void router_losses_cuda(const RouterLossesBackward<T>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)

}  // namespace torch_routers
