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
constexpr int kCombineWarps = 8;

// The warps of a block meet in 32 KiB of shared memory at most.
template <class T, int kPerLane>
constexpr int kFit = 32768 / static_cast<int>(WarpRow<T, kPerLane>::kSize * sizeof(T));
template <class T, int kPerLane>
constexpr int kForwardWarps = kFit<T, kPerLane> < 16 ? kFit<T, kPerLane> : 16;

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

// Of the lanes with the same expert the first gets the sum of their shares, in the order of lanes.
// True in such a first lane; `expert` < 0 takes no part.
template <class T> __device__ bool add_up_duplicates(int64_t expert, T& share) {
  const unsigned same = __match_any_sync(kAllLanes, expert);
  const bool first = lane() == __ffs(same) - 1;
  if (__any_sync(kAllLanes, expert >= 0 && !first))
    for (int l = 1; l < kWarp; ++l) {
      const T other = __shfl_sync(kAllLanes, share, l);
      if (first && l != lane() && (same >> l & 1)) share += other;
    }
  return first && expert >= 0;
}

template <class T> __device__ void write_masked(const Gate<T>& p, int64_t t) {
  for (int64_t j = t * p.slots + lane(); j < (t + 1) * p.slots; j += kWarp) {
    if (p.select) p.indices[j] = -1;
    p.weights[j] = 0;
  }
  if (p.lse && lane() == 0) p.lse[t] = 0;
}

// ---- rows that fit into registers --------------------------------------------------------------

// In lane j the expert of the j-th largest logit.
template <int kPerLane, class T> __device__ int select(const T* logits, int experts, int slots) {
  using Row = WarpRow<T, kPerLane>;
  Row row;
  row.load(logits, experts, T{0});
  Bits<T> keys[kPerLane], largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    keys[i] = Row::element(i) < experts ? rank_key(row.values[i]) : 0;
    largest = max(largest, keys[i]);
  }
  int expert = -1;
  for (int j = 0; j < slots; ++j) {
    largest = warp_max(largest);
    int mine = -1;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i)
      if (keys[i] == largest) mine = Row::offset(i);
    const int best = static_cast<int>(warp_min(mine < 0 ? ~0u : Row::first() + mine));
    if (lane() == j) expert = best;
    largest = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (Row::offset(i) == best - Row::first()) keys[i] = 0;
      largest = max(largest, keys[i]);
    }
  }
  return expert;
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kForwardWarps<T, kPerLane>* kWarp) forward(Gate<T> p) {
  using Row = WarpRow<T, kPerLane>;
  constexpr int kWarps = kForwardWarps<T, kPerLane>, kThreads = kWarps * kWarp;
  __shared__ alignas(16) T sums[kWarps][Row::kSize];
  __shared__ int counts[Row::kSize];
  const int experts = static_cast<int>(p.experts), slots = static_cast<int>(p.slots);
  const int64_t block = blockIdx.x, block_past = smaller((block + 1) * p.kBlock, p.tokens);

  for (int64_t first = block * p.kBlock; first < block_past;) {
    const Segment segment = segment_from(p, first, block_past);
    for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = 0;
    __syncthreads();

    T sum[kPerLane] = {};
    for (int64_t t = first + warp(); t < segment.past; t += kWarps) {
      if (is_masked(p, t)) {
        write_masked(p, t);
        continue;
      }
      const T* x = p.logits + t * p.experts;
      const bool has_slot = lane() < slots;
      int64_t* index = p.indices + t * p.slots + lane();
      int64_t expert = -1;
      if (p.select) {
        expert = select<kPerLane>(x, experts, slots);
        if (has_slot) *index = expert;
      } else if (has_slot) {
        expert = *index;
      }
      const Slot<T> slot(x, experts, expert);

      Softmax<T> parts;
      if (p.lse || !p.renormalize) {
        Row row;
        row.load(x, experts, kLowest<T>);
        parts = softmax(row);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) sum[i] += row.values[i];
        if (p.lse && lane() == 0) p.lse[t] = parts.lse();
      }
      if (p.renormalize) parts = softmax<T>(slots, [&](int64_t) { return slot.logit; });
      if (has_slot) p.weights[t * p.slots + lane()] = slot.weight(parts);
      if (slot.is_within(experts)) atomicAdd(&counts[expert], 1);
    }

#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums[warp()][Row::element(i)] = sum[i];
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += kThreads) {
      const int64_t partial = (block + segment.group) * p.experts + e;
      p.partial_counts[partial] = counts[e];
      if (!p.lse) continue;
      T total = 0;
      for (int w = 0; w < kWarps; ++w) total += sums[w][e];
      p.partial_sums[partial] = total;
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
    if (p.grad_score_sums)
      s.load(p.grad_score_sums + group_of(p, t) * p.experts, experts, T{0});
    else
      s.fill(0);
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
    T* all = rows[warp()];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) all[Row::element(i)] = row.values[i];
    __syncwarp();
    if (add_up_duplicates(slot.is_within(experts) ? slot.expert : -1, share))
      all[slot.expert] += share;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row.values[i] = all[Row::element(i)];
  }
  row.store(p.grad_logits + t * p.experts, experts);
}

// ---- rows of any length ------------------------------------------------------------------------

// Lane j % 32 writes the expert of the j-th largest logit: the largest of those that rank after
// the last one found.
template <class T>
__device__ void select_long(const T* logits, int64_t all_experts, int64_t slots, int64_t* best) {
  const auto experts = static_cast<std::uint32_t>(all_experts);
  Bits<T> last = ~Bits<T>{0};
  std::uint32_t after_last = 0;
  for (int64_t j = 0; j < slots; ++j) {
    Bits<T> largest = 0;
    std::uint32_t expert = ~0u;
    for (std::uint32_t e = lane(); e < experts; e += kWarp) {
      const Bits<T> key = rank_key(logits[e]);
      const bool open = key < last || (key == last && e >= after_last);
      if (open && key > largest) {
        largest = key;
        expert = e;
      }
    }
    last = warp_max(largest);
    expert = warp_min(largest == last ? expert : ~0u);
    after_last = expert + 1;
    if (lane() == j % kWarp) best[j] = expert;
  }
}

template <class T> __global__ void __launch_bounds__(kLongThreads) forward_long(Gate<T> p) {
  __shared__ Softmax<T> softmaxes[GateShape::kBlock];
  const int64_t block = blockIdx.x, block_past = smaller((block + 1) * p.kBlock, p.tokens);

  for (int64_t first = block * p.kBlock; first < block_past;) {
    const Segment segment = segment_from(p, first, block_past);
    int64_t* counts = p.partial_counts + (block + segment.group) * p.experts;
    for (int64_t e = threadIdx.x; e < p.experts; e += kLongThreads) counts[e] = 0;
    __syncthreads();

    for (int64_t t = first + warp(); t < segment.past; t += kLongThreads / kWarp) {
      if (is_masked(p, t)) {
        write_masked(p, t);
        continue;
      }
      const T* x = p.logits + t * p.experts;
      int64_t* indices = p.indices + t * p.slots;
      // A lane reads back only the indices it wrote itself.
      if (p.select) select_long(x, p.experts, p.slots, indices);
      Softmax<T> parts;
      if (p.lse || !p.renormalize) parts = softmax<T>(p.experts, [&](int64_t e) { return x[e]; });
      if (p.lse && lane() == 0) {
        p.lse[t] = parts.lse();
        softmaxes[t % p.kBlock] = parts;
      }
      if (p.renormalize)
        parts = softmax<T>(p.slots,
                           [&](int64_t j) { return Slot<T>(x, p.experts, indices[j]).logit; });
      for (int64_t j = lane(); j < p.slots; j += kWarp) {
        const Slot<T> slot(x, p.experts, indices[j]);
        p.weights[t * p.slots + j] = slot.weight(parts);
        if (slot.is_within(p.experts))
          atomicAdd(reinterpret_cast<unsigned long long*>(counts + slot.expert), 1ull);
      }
    }

    __syncthreads();
    for (int64_t e = threadIdx.x; p.lse && e < p.experts; e += kLongThreads) {
      T sum = 0;
      for (int64_t t = first; t < segment.past; ++t)
        if (!is_masked(p, t))
          sum += softmaxes[t % p.kBlock].probability(p.logits[t * p.experts + e]);
      p.partial_sums[(block + segment.group) * p.experts + e] = sum;
    }
    first = segment.past;
  }
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads) backward_long(GateBackward<T> p) {
  const int64_t t = int64_t{blockIdx.x} * (kBackwardThreads / kWarp) + warp();
  if (t >= p.tokens) return;
  const T* x = p.logits + t * p.experts;
  const int64_t* indices = p.indices + t * p.slots;
  T* dx = p.grad_logits + t * p.experts;
  const bool valid = !is_masked(p, t), weighed = valid && p.grad_weights;
  const auto slot_at = [&](int64_t j) { return Slot<T>(x, p.experts, indices[j]); };

  // Sum of the slots' weights times their gradients.
  const auto dot_slots = [&](const Softmax<T>& parts) {
    T dot = 0;
    for (int64_t j = lane(); j < p.slots; j += kWarp) {
      const Slot<T> slot = slot_at(j);
      if (slot.expert != -1) dot += p.grad_weights[t * p.slots + j] * slot.weight(parts);
    }
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
  for (int64_t first = 0; first < p.slots; first += kWarp) {
    __syncwarp();
    const int64_t j = first + lane();
    Slot<T> slot;
    T share = 0;
    if (j < p.slots) slot = slot_at(j);
    if (slot.expert != -1)
      share = slot.weight(parts) * (p.grad_weights[t * p.slots + j] - slots_dot);
    if (add_up_duplicates(slot.is_within(p.experts) ? slot.expert : -1, share))
      dx[slot.expert] += share;
  }
}

// ---- from segments to groups -------------------------------------------------------------------

// A lane per expert; the warps share the segments of the group.
template <class T>
__global__ void __launch_bounds__(kCombineWarps* kWarp) combine(GateCombine<T> p) {
  __shared__ double sums[kCombineWarps][kWarp];
  __shared__ int64_t counts[kCombineWarps][kWarp];
  __shared__ int64_t tokens[kCombineWarps];
  const int64_t chunks = (p.experts + kWarp - 1) / kWarp;
  const int64_t group = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t e = chunk * kWarp + lane();
  const auto clamp = [&](int64_t offset, int64_t low) {
    return offset < low ? low : smaller(offset, p.tokens);
  };
  const int64_t first = clamp(group_begin(p, group), 0), past = clamp(group_end(p, group), first);

  double sum = 0;
  int64_t count = 0, valid = 0;
  const Blocks blocks = blocks_of(first, past);
  for (int64_t block = blocks.first + warp(); e < p.experts && block < blocks.past;
       block += kCombineWarps) {
    const int64_t partial = (block + group) * p.experts + e;
    count += p.partial_counts[partial];
    if (p.partial_sums) sum += p.partial_sums[partial];
  }
  for (int64_t t = first + threadIdx.x; chunk == 0 && t < past; t += kCombineWarps * kWarp)
    valid += !is_masked(p, t);
  valid = warp_sum(valid);
  sums[warp()][lane()] = sum;
  counts[warp()][lane()] = count;
  if (lane() == 0) tokens[warp()] = valid;
  __syncthreads();

  if (warp() != 0) return;
  for (int w = 1; w < kCombineWarps; ++w) {
    sum += sums[w][lane()];
    count += counts[w][lane()];
    valid += tokens[w];
  }
  if (e < p.experts) {
    p.counts[group * p.experts + e] = count;
    if (p.partial_sums) p.score_sums[group * p.experts + e] = static_cast<T>(sum);
  }
  if (threadIdx.x == 0 && chunk == 0) p.group_tokens[group] = valid;
}

// ---- launching ---------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// With the kernel that holds kPerLane experts in a lane, or twice as many, and so on.
template <int kPerLane = 1, class T> void launch_rows(const Gate<T>& p, void* stream) {
  if constexpr (kPerLane > kMostPerLane)
    launch("gate", forward_long<T>, p.blocks(), kLongThreads, stream, p);
  else if (p.slots <= kWarp && p.experts <= kPerLane * kWarp)
    launch("gate", forward<T, kPerLane>, p.blocks(), kForwardWarps<T, kPerLane> * kWarp, stream,
           p);
  else
    launch_rows<2 * kPerLane>(p, stream);
}

template <int kPerLane = 1, class T> void launch_rows(const GateBackward<T>& p, void* stream) {
  const int64_t blocks = ceil_div(p.tokens, kBackwardThreads / kWarp);
  if constexpr (kPerLane > kMostPerLane)
    launch("gate", backward_long<T>, blocks, kBackwardThreads, stream, p);
  else if (p.slots <= kWarp && p.experts <= kPerLane * kWarp)
    launch("gate", backward<T, kPerLane>, blocks, kBackwardThreads, stream, p);
  else
    launch_rows<2 * kPerLane>(p, stream);
}

}  // namespace

template <class T> void gate_cuda(const Gate<T>& p, void* stream) { launch_rows(p, stream); }

template <class T> void gate_cuda(const GateCombine<T>& p, void* stream) {
  launch("gate", combine<T>, p.groups * ceil_div(p.experts, kWarp), kCombineWarps * kWarp, stream,
         p);
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
