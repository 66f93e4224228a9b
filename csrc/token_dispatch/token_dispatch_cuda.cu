// To rows a warp per row, to tokens a block per token, to weights a warp per slot. Where rows begin at
// multiples of 16 bytes they are moved by as much, else by elements. Not run on a GPU yet.
//
// Nobody has checked the values of order and inverse. A slot and a row that do not name each other
// have none; each row then belongs to one slot at most, and is written exactly once.
#include "common/cuda.cuh"
#include "token_dispatch/token_dispatch_kernel.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kThreads = 128, kWarps = kThreads / kWarp;

// The row of a slot, the slot of a row; -1 if there is none.
__device__ int64_t row_of(const DispatchPlan& p, int64_t slot) {
  const int64_t row = p.inverse[slot];
  return 0 <= row && row < p.max_rows && p.order[row] == slot ? row : -1;
}
__device__ int64_t slot_of(const DispatchPlan& p, int64_t row) {
  const int64_t slot = p.order[row];
  return 0 <= slot && slot < p.tokens * p.slots && p.inverse[slot] == row ? slot : -1;
}

template <int kPack, class T>
__device__ Pack<T, kPack> scaled(const Pack<T, kPack>& pack, Compute<T> weight) {
  Pack<T, kPack> result;
#pragma unroll
  for (int i = 0; i < kPack; ++i) store(&result.values[i], weight * load(pack.values[i]));
  return result;
}

template <class T, int kPack>
__device__ Pack<T, kPack> rounded(const Compute<T> (&sums)[kPack]) {
  Pack<T, kPack> result;
#pragma unroll
  for (int i = 0; i < kPack; ++i) store(&result.values[i], sums[i]);
  return result;
}

template <int kPack, class T> __device__ void clear(T* row, int64_t hidden) {
  for (int64_t h = lane() * kPack; h < hidden; h += kWarp * kPack)
    store_pack(row + h, Pack<T, kPack>{});
}

// ---- kernels -----------------------------------------------------------------------------------

template <class T, int kPack> __global__ void __launch_bounds__(kThreads) permute(Permute<T> p) {
  const int64_t r = int64_t{blockIdx.x} * kWarps + warp();
  if (r >= p.max_rows) return;
  T* row = p.row + r * p.hidden;
  const int64_t slot = slot_of(p, r);
  if (slot < 0) return clear<kPack>(row, p.hidden);
  const T* token = p.token + slot / p.slots * p.hidden;
  const int64_t first = lane() * kPack;
  if (p.weights) {
    const Compute<T> weight = p.weights[slot];
#pragma unroll 4
    for (int64_t h = first; h < p.hidden; h += kWarp * kPack)
      store_pack(row + h, scaled(load_pack<kPack>(token + h), weight));
  } else {
#pragma unroll 4
    for (int64_t h = first; h < p.hidden; h += kWarp * kPack)
      store_pack(row + h, load_pack<kPack>(token + h));
  }
}

template <class T, int kPack> __global__ void __launch_bounds__(kThreads) combine(Combine<T> p) {
  const unsigned chunks = gridDim.x / static_cast<unsigned>(p.tokens);  // of kThreads packs
  const int64_t t = blockIdx.x / chunks;
  const unsigned pack = blockIdx.x % chunks * kThreads + threadIdx.x;
  const int64_t h = int64_t{pack} * kPack;
  if (h >= p.hidden) return;
  Compute<T> sums[kPack] = {};
  for (int64_t slot = t * p.slots; slot < (t + 1) * p.slots; ++slot) {
    const int64_t r = row_of(p, slot);
    if (r < 0) continue;
    const Compute<T> weight = p.weights ? p.weights[slot] : 1;
    const auto row = load_pack<kPack>(p.row + r * p.hidden + h);
#pragma unroll
    for (int i = 0; i < kPack; ++i) sums[i] += weight * load(row.values[i]);
  }
  store_pack(p.token + t * p.hidden + h, rounded<T>(sums));
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) combine_backward(CombineBackward<T> p) {
  const int64_t slot = int64_t{blockIdx.x} * kWarps + warp();
  if (slot >= p.tokens * p.slots) return;
  const int64_t r = row_of(p, slot);
  Compute<T> dot = 0;
  if (r >= 0) {
    const T *token = p.token + slot / p.slots * p.hidden, *row = p.row + r * p.hidden;
    const Compute<T> weight = p.weights ? p.weights[slot] : 0;
    for (int64_t h = lane() * kPack; h < p.hidden; h += kWarp * kPack) {
      const auto x = load_pack<kPack>(token + h), y = load_pack<kPack>(row + h);
#pragma unroll
      for (int i = 0; i < kPack; ++i) dot += load(x.values[i]) * load(y.values[i]);
      if (p.weights) store_pack(p.grad_row + r * p.hidden + h, scaled(x, weight));
    }
    dot = warp_sum(dot);
  }
  if (lane() == 0) p.grad_weights[slot] = dot;
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) clear_unused(ClearUnused<T> p) {
  const int64_t r = int64_t{blockIdx.x} * kWarps + warp();
  if (r < p.max_rows && slot_of(p, r) < 0) clear<kPack>(p.row + r * p.hidden, p.hidden);
}

// ---- launching ---------------------------------------------------------------------------------

int64_t blocks_of(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

}  // namespace

template <class T> void dispatch_cuda(const Permute<T>& p, void* stream) {
  const auto kernel =
      is_aligned<T>(p.hidden, {p.token, p.row}) ? permute<T, kWidest<T>> : permute<T, 1>;
  launch("permute_tokens", kernel, blocks_of(p.max_rows, kWarps), kThreads, stream, p);
}

template <class T> void dispatch_cuda(const Combine<T>& p, void* stream) {
  const bool wide = is_aligned<T>(p.hidden, {p.row, p.token});
  const int64_t chunks = blocks_of(p.hidden, kThreads * (wide ? kWidest<T> : 1));
  launch("combine_tokens", wide ? combine<T, kWidest<T>> : combine<T, 1>, p.tokens * chunks,
         kThreads, stream, p);
}

template <class T> void dispatch_cuda(const CombineBackward<T>& p, void* stream) {
  const bool wide = is_aligned<T>(p.hidden, {p.token, p.row, p.grad_row});
  launch("_combine_backward", wide ? combine_backward<T, kWidest<T>> : combine_backward<T, 1>,
         blocks_of(p.tokens * p.slots, kWarps), kThreads, stream, p);
  if (p.weights)
    launch("_combine_backward", wide ? clear_unused<T, kWidest<T>> : clear_unused<T, 1>,
           blocks_of(p.max_rows, kWarps), kThreads, stream, ClearUnused<T>{p, p.grad_row});
}

#define TORCH_ROUTERS_INSTANTIATE(T)                           \
  template void dispatch_cuda(const Permute<T>&, void*);       \
  template void dispatch_cuda(const Combine<T>&, void*);       \
  template void dispatch_cuda(const CombineBackward<T>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)

}  // namespace torch_routers
