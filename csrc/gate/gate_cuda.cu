// One warp per token. Up to 1024 experts and 32 slots its row is in registers; beyond that the row
// is read again for every slot. In the forward a thread block takes the tokens of a block of
// gate_kernel.h, so that it alone writes the results of its segments. Not run on a GPU yet.
//
// Here, unlike on the CPU, nobody has checked the values of indices and group_offsets. An index
// that is no expert's stands for an expert with the logit NaN that is counted nowhere. Offsets that
// do not ascend from 0 to the number of tokens give wrong sums, but no access out of bounds.
#include "common/cuda.cuh"
#include "gate/gate_kernel.h"
#include "gate/gate_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kMostPerLane = 32;  // experts that a lane holds
constexpr int kBackwardThreads = 128;
constexpr int kLongThreads = 256;
constexpr int kCombineThreads = 256;

// As many warps as 32 KiB of shared memory hold a row for.
template <class T, int kPerLane>
constexpr int kRows = 32768 / static_cast<int>(WarpRow<T, kPerLane>::kSize * sizeof(T));
template <class T, int kPerLane>
constexpr int kForwardThreads = kWarp * (kRows<T, kPerLane> < 16 ? kRows<T, kPerLane> : 16);

// ---- parts of all kernels ----------------------------------------------------------------------

template <class Params> __device__ bool is_masked(const Params& p, int64_t token) {
  return p.valid && !p.valid[token];
}

// The group of token `first`, and where its part of the block that ends at `past` ends. From one
// segment to the next the group grows, whatever the offsets.
struct Segment {
  int64_t group, past;
};
template <class Params>
__device__ Segment segment_from(const Params& p, int64_t first, int64_t past) {
  const int64_t group = group_of(p, first);
  return {group, group == p.groups - 1 ? past : smaller(group_end(p, group), past)};
}

// The expert in a slot of a token, -1 for none, and its logit.
template <class T> struct Slot {
  int64_t expert = -1;
  T logit = kLowest<T>;  // as that of none: adds nothing to a softmax

  Slot() = default;
  __device__ Slot(const T* logits, int64_t experts, int64_t expert) : expert(expert) {
    if (is_within(experts))
      logit = logits[expert];
    else if (expert != -1)
      logit = static_cast<T>(__builtin_nan(""));
  }
  __device__ bool is_within(int64_t experts) const { return 0 <= expert && expert < experts; }
  __device__ T weight(const Softmax<T>& parts) const {
    return expert == -1 ? T{0} : parts.probability(logit);
  }
};

// Softmax of logit(0) ... logit(size - 1).
template <class T, class Logit> __device__ Softmax<T> softmax(int64_t size, const Logit& logit) {
  Softmax<T> parts;
  T max = kLowest<T>, sum = 0;
  for (int64_t i = lane(); i < size; i += kWarp) {
    const T x = logit(i);
    max = x > max ? x : max;
  }
  parts.set_max(warp_max(max));
  for (int64_t i = lane(); i < size; i += kWarp) sum += own_exp(logit(i) - parts.max);
  parts.set_sum(warp_sum(sum));
  return parts;
}

// The same of a row, which becomes its probabilities. What is beyond it is -infinity before.
template <class T, int kPerLane> __device__ Softmax<T> softmax(WarpRow<T, kPerLane>& row) {
  Softmax<T> parts;
  T max = kLowest<T>, sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) max = row.values[i] > max ? row.values[i] : max;
  parts.set_max(warp_max(max));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    row.values[i] = own_exp(row.values[i] - parts.max);
    sum += row.values[i];
  }
  parts.set_sum(warp_sum(sum));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) row.values[i] *= parts.scale;
  return parts;
}

// Writes the results of a masked token; false if it is not masked.
template <class T> __device__ bool write_masked(const Gate<T>& p, int64_t t) {
  if (!is_masked(p, t)) return false;
#pragma unroll 1
  for (int64_t j = t * p.slots + lane(); j < (t + 1) * p.slots; j += kWarp) {
    if (p.select) p.indices[j] = -1;
    p.weights[j] = 0;
  }
  if (p.lse && lane() == 0) p.lse[t] = 0;
  return true;
}

// ---- rows that fit into registers --------------------------------------------------------------

template <class T, int kPerLane>
__global__ void __launch_bounds__(kForwardThreads<T, kPerLane>, 2) forward(Gate<T> p) {
  using Row = WarpRow<T, kPerLane>;
  constexpr int kThreads = kForwardThreads<T, kPerLane>, kWarps = kThreads / kWarp;
  __shared__ alignas(16) T sums[kWarps][Row::kSize];
  __shared__ int counts[Row::kSize];
  const int experts = static_cast<int>(p.experts), slots = static_cast<int>(p.slots);
  const int64_t block = blockIdx.x, block_past = smaller((block + 1) * p.kBlock, p.tokens);

  for (int64_t first = block * p.kBlock; first < block_past;) {
    const Segment segment = segment_from(p, first, block_past);
    for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = 0;
    __syncthreads();  // also: the sums of the last segment have been read
    T* sum = Row::own(sums[warp()]);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum[Row::offset(i)] = 0;

    for (int64_t t = first + warp(); t < segment.past; t += kWarps) {
      if (write_masked(p, t)) continue;
      const T* x = p.logits + t * p.experts;
      const bool has_slot = lane() < slots;
      int64_t* index = p.indices + t * p.slots + lane();
      int64_t expert = has_slot && !p.select ? *index : -1;
      Row row;
      if (p.select) {
        row.load(x, experts, kLowest<T>);
        expert = warp_select(row, slots);
        if (has_slot) *index = expert;
      }
      const Slot<T> slot(x, experts, expert);

      Softmax<T> parts;
      if (p.lse || !p.renormalize) {
        row.load(x, experts, kLowest<T>);  // again: held meanwhile, it would cost registers
        parts = softmax(row);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) sum[Row::offset(i)] += row.values[i];
        if (p.lse && lane() == 0) p.lse[t] = parts.lse();
      }
      if (p.renormalize) parts = softmax<T>(slots, [&](int64_t) { return slot.logit; });
      if (has_slot) p.weights[t * p.slots + lane()] = slot.weight(parts);
      if (slot.is_within(experts)) atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += kThreads) {
      const int64_t partial = (block + segment.group) * p.experts + e;
      p.partial_counts[partial] = counts[e];
      T total = 0;
#pragma unroll 1
      for (int w = 0; p.lse && w < kWarps; ++w) total += sums[w][e];
      if (p.lse) p.partial_sums[partial] = total;
    }
    first = segment.past;
  }
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kBackwardThreads) backward(GateBackward<T> p) {
  using Row = WarpRow<T, kPerLane>;
  constexpr int kWarps = kBackwardThreads / kWarp;
  __shared__ alignas(16) T rows[kWarps][Row::kSize];
  const int64_t t = int64_t{blockIdx.x} * kWarps + warp();
  if (t >= p.tokens) return;
  const int experts = static_cast<int>(p.experts), slots = static_cast<int>(p.slots);
  const T* x = p.logits + t * p.experts;
  const bool valid = !is_masked(p, t), weighed = valid && p.grad_weights;

  Slot<T> slot;
  T grad = 0, share = 0;  // of the slot's weight; of the slot in its expert's gradient
  if (weighed && lane() < slots) {
    slot = Slot<T>(x, experts, p.indices[t * p.slots + lane()]);
    if (slot.expert != -1) grad = p.grad_weights[t * p.slots + lane()];
  }

  Row row;
  if (valid && (!p.renormalize || p.grad_lse || p.grad_score_sums)) {
    row.load(x, experts, kLowest<T>);
    const Softmax<T> parts = softmax(row);
    Row s;
    s.fill(0);
    if (p.grad_score_sums) s.load(p.grad_score_sums + group_of(p, t) * p.experts, experts, T{0});
    if (!p.renormalize) share = grad * slot.weight(parts);
    T dot = share;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) dot += s.values[i] * row.values[i];
    const T constant = (p.grad_lse ? p.grad_lse[t] : T{0}) - warp_sum(dot);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      row.values[i] = parts.sum == 0 ? T{0} : row.values[i] * (s.values[i] + constant);
  } else {
    row.fill(0);
  }

  if (weighed) {
    if (p.renormalize) {
      const auto parts = softmax<T>(slots, [&](int64_t) { return slot.logit; });
      const T weight = slot.weight(parts);
      share = weight * (grad - warp_sum(grad * weight));
    }
    // Slots may be anywhere in the row: they are added in shared memory.
    T *all = rows[warp()], *own = Row::own(all);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) own[Row::offset(i)] = row.values[i];
    __syncwarp();
    if (warp_add_duplicates(slot.is_within(experts) ? slot.expert : -1, share))
      all[slot.expert] += share;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row.values[i] = own[Row::offset(i)];
  }
  row.store(p.grad_logits + t * p.experts, experts);
}

// ---- rows of any length ------------------------------------------------------------------------

template <class T> __global__ void __launch_bounds__(kLongThreads) forward_long(Gate<T> p) {
  __shared__ Softmax<T> softmaxes[GateShape::kBlock];
  const int64_t block = blockIdx.x, block_past = smaller((block + 1) * p.kBlock, p.tokens);

  for (int64_t first = block * p.kBlock; first < block_past;) {
    const Segment segment = segment_from(p, first, block_past);
    const int64_t partial = (block + segment.group) * p.experts;
    int64_t* counts = p.partial_counts + partial;
    for (int64_t e = threadIdx.x; e < p.experts; e += kLongThreads) counts[e] = 0;
    __syncthreads();
    for (int64_t t = first + warp(); t < segment.past; t += kLongThreads / kWarp) {
      if (write_masked(p, t)) continue;
      const T* x = p.logits + t * p.experts;
      int64_t* indices = p.indices + t * p.slots;
      const auto slot_at = [&](int64_t j) { return Slot<T>(x, p.experts, indices[j]); };
      // A lane reads back only the indices it wrote itself.
      if (p.select) warp_select(x, p.experts, p.slots, indices);
      Softmax<T> parts;
      if (p.lse || !p.renormalize) parts = softmax<T>(p.experts, [&](int64_t e) { return x[e]; });
      if (p.lse && lane() == 0) {
        p.lse[t] = parts.lse();
        softmaxes[t % p.kBlock] = parts;
      }
      if (p.renormalize) parts = softmax<T>(p.slots, [&](int64_t j) { return slot_at(j).logit; });
      for (int64_t j = lane(); j < p.slots; j += kWarp) {
        const Slot<T> slot = slot_at(j);
        p.weights[t * p.slots + j] = slot.weight(parts);
        if (slot.is_within(p.experts))
          atomicAdd(reinterpret_cast<unsigned long long*>(counts + slot.expert), 1ull);
      }
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; p.lse && e < p.experts; e += kLongThreads) {
      T sum = 0;  // of the probabilities, made once more
      for (int64_t t = first; t < segment.past; ++t)
        if (!is_masked(p, t))
          sum += softmaxes[t % p.kBlock].probability(p.logits[t * p.experts + e]);
      p.partial_sums[partial + e] = sum;
    }
    first = segment.past;
  }
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads) backward_long(GateBackward<T> p) {
  const int64_t t = int64_t{blockIdx.x} * (kBackwardThreads / kWarp) + warp();
  if (t >= p.tokens) return;
  const T* x = p.logits + t * p.experts;
  T* dx = p.grad_logits + t * p.experts;
  const bool valid = !is_masked(p, t), weighed = valid && p.grad_weights;
  const auto slot_at = [&](int64_t j) { return Slot<T>(x, p.experts, p.indices[t * p.slots + j]); };
  // The slots' weights times their gradients.
  const auto dot_slots = [&](const Softmax<T>& parts) {
    T dot = 0;
    for (int64_t j = lane(); j < p.slots; j += kWarp)
      if (const auto slot = slot_at(j); slot.expert != -1)
        dot += p.grad_weights[t * p.slots + j] * slot.weight(parts);
    return warp_sum(dot);
  };

  Softmax<T> parts;
  T slots_dot = 0;
  if (valid && (!p.renormalize || p.grad_lse || p.grad_score_sums)) {
    parts = softmax<T>(p.experts, [&](int64_t e) { return x[e]; });
    const T* s = p.grad_score_sums ? p.grad_score_sums + group_of(p, t) * p.experts : nullptr;
    T dot = 0;
    for (int64_t e = lane(); s && e < p.experts; e += kWarp) dot += s[e] * parts.probability(x[e]);
    dot = warp_sum(dot);
    if (weighed && !p.renormalize) dot += dot_slots(parts);
    const T constant = (p.grad_lse ? p.grad_lse[t] : T{0}) - dot;
    for (int64_t e = lane(); e < p.experts; e += kWarp)
      dx[e] = parts.sum == 0 ? T{0} : parts.probability(x[e]) * ((s ? s[e] : T{0}) + constant);
  } else {
    for (int64_t e = lane(); e < p.experts; e += kWarp) dx[e] = 0;
  }
  if (!weighed) return;
  if (p.renormalize) {
    parts = softmax<T>(p.slots, [&](int64_t j) { return slot_at(j).logit; });
    slots_dot = dot_slots(parts);
  }
  for (int64_t j = lane(); j - lane() < p.slots; j += kWarp) {
    __syncwarp();  // what lanes wrote to dx before
    const Slot<T> slot = j < p.slots ? slot_at(j) : Slot<T>();
    T share = 0;
    if (slot.expert != -1)
      share = slot.weight(parts) * (p.grad_weights[t * p.slots + j] - slots_dot);
    if (warp_add_duplicates(slot.is_within(p.experts) ? slot.expert : -1, share))
      dx[slot.expert] += share;
  }
}

// ---- from segments to groups -------------------------------------------------------------------

TORCH_ROUTERS_HOST_DEVICE int64_t chunks(const GateShape& shape) {
  return (shape.experts + kWarp - 1) / kWarp;
}

// A lane per expert; the warps share the segments of a group.
template <class T> __global__ void __launch_bounds__(kCombineThreads) combine(GateCombine<T> p) {
  constexpr int kWarps = kCombineThreads / kWarp;
  __shared__ double sums[kWarps][kWarp];
  __shared__ int64_t counts[kWarps][kWarp];
  __shared__ int64_t tokens[kWarps];
  const int64_t group = blockIdx.x / chunks(p), chunk = blockIdx.x % chunks(p);
  const int64_t e = chunk * kWarp + lane();
  const auto clamp = [&](int64_t t) { return t < 0 ? 0 : smaller(t, p.tokens); };
  const int64_t first = clamp(group_begin(p, group)), past = clamp(group_end(p, group));
  const Blocks blocks = blocks_of(first, past);

  double sum = 0;
  int64_t count = 0, valid = 0;
  for (int64_t b = blocks.first + warp(); e < p.experts && b < blocks.past; b += kWarps) {
    const int64_t partial = (b + group) * p.experts + e;
    count += p.partial_counts[partial];
    if (p.score_sums) sum += p.partial_sums[partial];
  }
  for (int64_t t = first + threadIdx.x; chunk == 0 && t < past; t += kCombineThreads)
    valid += !is_masked(p, t);
  valid = warp_sum(valid);

  sums[warp()][lane()] = sum;
  counts[warp()][lane()] = count;
  if (lane() == 0) tokens[warp()] = valid;
  __syncthreads();
  if (warp() != 0) return;
  for (int w = 1; w < kWarps; ++w) {
    sum += sums[w][lane()];
    count += counts[w][lane()];
    valid += tokens[w];
  }
  if (threadIdx.x == 0 && chunk == 0) p.group_tokens[group] = valid;
  if (e >= p.experts) return;
  p.counts[group * p.experts + e] = count;
  if (p.score_sums) p.score_sums[group * p.experts + e] = static_cast<T>(sum);
}

// ---- launching ---------------------------------------------------------------------------------

// With the kernel that holds kPerLane experts in a lane, or twice as many, and so on.
template <int kPerLane = 1, class T> void launch_rows(const Gate<T>& p, void* stream) {
  if constexpr (kPerLane > kMostPerLane)
    launch("gate", forward_long<T>, p.blocks(), kLongThreads, stream, p);
  else if (p.slots > kWarp || p.experts > kPerLane * kWarp)
    launch_rows<2 * kPerLane>(p, stream);
  else
    launch("gate", forward<T, kPerLane>, p.blocks(), kForwardThreads<T, kPerLane>, stream, p);
}
template <int kPerLane = 1, class T> void launch_rows(const GateBackward<T>& p, void* stream) {
  const int64_t blocks = (p.tokens * kWarp + kBackwardThreads - 1) / kBackwardThreads;
  if constexpr (kPerLane > kMostPerLane)
    launch("gate", backward_long<T>, blocks, kBackwardThreads, stream, p);
  else if (p.slots > kWarp || p.experts > kPerLane * kWarp)
    launch_rows<2 * kPerLane>(p, stream);
  else
    launch("gate", backward<T, kPerLane>, blocks, kBackwardThreads, stream, p);
}

}  // namespace

template <class T> void gate_cuda(const Gate<T>& p, void* stream) { launch_rows(p, stream); }
template <class T> void gate_cuda(const GateCombine<T>& p, void* stream) {
  launch("gate", combine<T>, p.groups * chunks(p), kCombineThreads, stream, p);
}
template <class T> void gate_cuda(const GateBackward<T>& p, void* stream) {
  launch_rows(p, stream);
}

#define TORCH_ROUTERS_INSTANTIATE(T)                     \
  template void gate_cuda(const Gate<T>&, void*);        \
  template void gate_cuda(const GateCombine<T>&, void*); \
  template void gate_cuda(const GateBackward<T>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)

}  // namespace torch_routers
