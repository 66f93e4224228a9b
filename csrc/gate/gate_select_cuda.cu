// Selection by scores, with a bias, among groups of experts, or of long rows; where a warp needs its
// logits only, gate_cuda.cu selects itself. A warp per token where a row fits into registers, else a
// block of threads, which reads it again for every byte of a key. Not run on a GPU yet.
//
// Indices are those of the CPU to the bit: what is compared is computed by the same operations in
// the same order. Of the softmax that includes the sum over the row, of which only half a warp can
// take part: with a bias, rows of 10^5 experts and more are slow.
//
// nvcc: --fmad=false
#include "common/block_select.cuh"
#include "common/row.h"
#include "gate/gate_cuda.cuh"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kMostGroups = 1024;  // whose values a block holds; those of others are made each time

// As many warps as 32 KiB hold rows of values and keys for.
template <class S, int kPerLane>
constexpr int kWarps = 16384 / static_cast<int>(kWarp * kPerLane * sizeof(Compute<S>));
template <class S, int kPerLane>
constexpr int kRowThreads = kWarp * (kWarps<S, kPerLane> < 8 ? kWarps<S, kPerLane> : 8);

// softmax_row of gate_row.h, to the bit: the sum in the order of common/row.h.
template <class S>
__device__ Softmax<Compute<S>> softmax_in_order(const S* logits, int64_t experts) {
  using C = Compute<S>;
  Softmax<C> parts;
  C max = kLowest<C>, sum = 0;
  for (int64_t e = lane(); e < experts; e += kWarp) {
    const C x = load(logits[e]);
    max = x > max ? x : max;
  }
  parts.set_max(warp_max(max));
  for (int64_t e = lane(); lane() < kLanes && e < experts; e += kLanes)
    sum += own_exp(load(logits[e]) - parts.max);
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
  parts.set_sum(__shfl_sync(kAllLanes, sum, 0));
  return parts;
}

// What is compared in the row of a token: select_row of gate_row.h.
template <class S> struct Values {
  using C = Compute<S>;
  const GateSelection<C>& selection;
  const S* logits;
  Score score;
  bool of_scores;  // groups are compared by them, and with a bias experts
  Softmax<C> parts;

  __device__ Values(const Gate<S>& p, int64_t t)
      : selection(p.selection), logits(p.logits + t * p.experts), score(p.weighing.score) {
    of_scores = selection.bias || (selection.expert_groups && selection.group_best > 1);
    if (of_scores && score == Score::Softmax) parts = softmax_in_order(logits, p.experts);
  }
  __device__ C logit(int64_t e) const { return load(logits[e]); }
  __device__ C in_group(int64_t e) const {
    if (!of_scores) return logit(e);
    const C value = score_in_row(score, logit(e), parts);
    return selection.bias ? value + selection.bias[e] : value;
  }
  __device__ C of_expert(int64_t e) const { return selection.bias ? in_group(e) : logit(e); }
};

// The key of a group of `size` experts, whose values are value(0) ... value(size - 1).
template <class C, class Value>
__device__ Bits<C> group_key(const GateSelection<C>& s, int64_t size, const Value& value) {
  return rank_key(sum_of_largest(size, s.group_best, value));
}

template <class S, int kPerLane>
__global__ void __launch_bounds__(kRowThreads<S, kPerLane>) select_rows(Gate<S> p) {
  using C = Compute<S>;
  using Row = WarpRow<S, kPerLane>;
  constexpr int kWarps = kRowThreads<S, kPerLane> / kWarp;
  __shared__ C all_values[kWarps][Row::kSize];
  __shared__ Bits<C> all_keys[kWarps][Row::kSize];
  __shared__ bool all_kept[kWarps][Row::kSize];
  const int64_t t = int64_t{blockIdx.x} * kWarps + warp();
  if (t >= p.tokens) return;
  const int experts = static_cast<int>(p.experts), slots = static_cast<int>(p.slots);
  int selected = -1;

  if (!is_masked(p, t)) {
    C* values = all_values[warp()];
    Bits<C>* keys = all_keys[warp()];
    bool* kept = all_kept[warp()];
    const auto& s = p.selection;
    const Values<S> row(p, t);
    const int groups = static_cast<int>(s.expert_groups), size = groups ? experts / groups : 1;
#pragma unroll 1
    for (int e = lane(); e < experts; e += kWarp) values[e] = row.in_group(e);
    __syncwarp();
#pragma unroll 1
    for (int g = lane(); g < groups; g += kWarp)
      keys[g] = group_key(s, size, [&](int64_t i) { return values[g * size + i]; });
    __syncwarp();
#pragma unroll 1
    for (int g = lane(); g < groups; g += kWarp) {
      int better = 0;
      for (int h = 0; h < groups; ++h) better += keys[h] > keys[g] || (keys[h] == keys[g] && h < g);
      kept[g] = better < s.kept_groups;
    }
    __syncwarp();
#pragma unroll 1
    for (int e = lane(); e < experts; e += kWarp) {
      const bool is_open = groups == 0 || kept[e / size];
      keys[e] = is_open ? rank_key(s.bias ? values[e] : row.logit(e)) : 0;
    }
    __syncwarp();
    Bits<C> own[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      own[i] = Row::has(i, experts) ? Row::own(keys)[Row::offset(i)] : 0;
    selected = warp_select<Row>(own, static_cast<int>(filled_slots(p, t)));
  }
  if (lane() < slots) p.indices[t * slots + lane()] = selected;
}

template <class S> __global__ void __launch_bounds__(kSelectThreads, 2) select_long(Gate<S> p) {
  using Key = Bits<Compute<S>>;
  __shared__ SelectStorage storage;
  __shared__ Key group_keys[kMostGroups];
  const int64_t t = blockIdx.x, count = is_masked(p, t) ? 0 : filled_slots(p, t);
  int64_t* best = p.indices + t * p.slots;
  for (int64_t j = count + threadIdx.x; j < p.slots; j += kSelectThreads) best[j] = -1;
  if (count == 0) return;

  const auto& s = p.selection;
  const Values<S> row(p, t);
  const int64_t groups = s.expert_groups, size = groups ? p.experts / groups : 1;
  const auto make_key = [&](int64_t g) {
    return group_key(s, size, [&](int64_t i) { return row.in_group(g * size + i); });
  };
  for (int64_t g = threadIdx.x; g < smaller(groups, kMostGroups); g += kSelectThreads)
    group_keys[g] = make_key(g);
  __syncthreads();
  const auto key_of_group = [&](int64_t g) {
    return g < kMostGroups ? group_keys[g] : make_key(g);
  };
  Largest<Key> kept{};
  if (groups) kept = block_largest<Key>(groups, s.kept_groups, key_of_group, storage);
  const auto key_of = [&](int64_t e) {
    const bool is_open = groups == 0 || kept.has(key_of_group(e / size), e / size);
    return is_open ? rank_key(row.of_expert(e)) : Key{0};
  };
  block_select<Key>(p.experts, count, key_of, best, storage);
  block_sort(best, count, [&](int64_t e) { return rank_key(row.of_expert(e)); });
}

// With the kernel that holds kPerLane experts in a lane, or four times as many.
template <int kPerLane = 2, class S> void launch_select(const Gate<S>& p, void* stream) {
  if constexpr (kPerLane > kMostPerLane<S>) {
    launch("gate", select_long<S>, p.tokens, kSelectThreads, stream, p);
  } else if (!is_short<S>(p) || p.experts > kPerLane * kWarp) {
    launch_select<4 * kPerLane>(p, stream);
  } else {
    constexpr int kThreads = kRowThreads<S, kPerLane>;
    const int64_t blocks = (p.tokens * kWarp + kThreads - 1) / kThreads;
    launch("gate", select_rows<S, kPerLane>, blocks, kThreads, stream, p);
  }
}

}  // namespace

template <class S> void gate_select_cuda(const Gate<S>& p, void* stream) {
  launch_select(p, stream);
}
template void gate_select_cuda(const Gate<float>&, void*);
template void gate_select_cuda(const Gate<double>&, void*);
template void gate_select_cuda(const Gate<BFloat16>&, void*);
template void gate_select_cuda(const Gate<Float16>&, void*);

}  // namespace torch_routers
