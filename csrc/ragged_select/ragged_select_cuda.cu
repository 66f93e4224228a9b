// A warp per token, whose lanes all take the same decision. Not run on a GPU yet.
#include "common/cuda.cuh"
#include "ragged_select/ragged_select_kernel.h"
#include "ragged_select/ragged_select_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

template <class T> __global__ void __launch_bounds__(kThreads, 1) cut_rows(RaggedSelect<T> p) {
  const int64_t token = int64_t{blockIdx.x} * kWarps + warp();
  if (token >= p.tokens) return;
  const T* z = p.logits + token * p.experts;
  RaggedSums<T> sums{-static_cast<T>(__builtin_huge_val()), 0, 0};
  for (int64_t e = lane(); e < p.experts; e += kWarp) sums.max = z[e] > sums.max ? z[e] : sums.max;
  sums.max = warp_max(sums.max);
  for (int64_t e = lane(); e < p.experts; e += kWarp) {
    const T distance = z[e] - sums.max, power = own_exp(distance);
    sums.sum += power;
    sums.product += ragged_product(power, distance);
  }
  sums.sum = warp_sum(sums.sum);
  sums.product = warp_sum(sums.product);
  const int64_t count = ragged_count(p, token, sums);
  for (int64_t j = lane(); j < p.slots; j += kWarp)
    p.indices[token * p.slots + j] = j < count ? p.order[token * p.slots + j] : -1;
}

}  // namespace

template <class T> void ragged_select_cuda(const RaggedSelect<T>& p, void* stream) {
  launch("ragged_select", cut_rows<T>, (p.tokens + kWarps - 1) / kWarps, kThreads, stream, p);
}

template void ragged_select_cuda(const RaggedSelect<float>&, void*);
template void ragged_select_cuda(const RaggedSelect<double>&, void*);

}  // namespace torch_routers
