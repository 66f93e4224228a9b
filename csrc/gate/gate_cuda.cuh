// What the CUDA files of the gate share: softmax, scores and weights of a token, by a warp.
#pragma once

#include "common/cuda.cuh"
#include "gate/gate_kernel.h"
#include "gate/gate_math.h"

namespace torch_routers {

// Selection alone, of any kind.
template <class S> void gate_select_cuda(const Gate<S>&, void* stream);

// Unnamed, as the types of gate_math.h that are used here.
namespace {

// Rows of up to so many experts, and no more slots than a warp has lanes, are held in registers.
template <class S> constexpr int kMostPerLane = sizeof(Compute<S>) == 4 ? 32 : 16;
template <class S> bool is_short(const GateShape& p) {
  return p.experts <= kMostPerLane<S> * kWarp && p.slots <= kWarp;
}

template <class Params> __device__ bool is_masked(const Params& p, std::int64_t token) {
  return p.valid && !p.valid[token];
}

// How many slots of a token are filled. Nobody has checked the values of token_top_k.
template <class S> __device__ std::int64_t filled_slots(const Gate<S>& p, std::int64_t t) {
  const std::int64_t count = p.token_top_k ? p.token_top_k[t] : p.slots;
  return count < 0 ? 0 : smaller(count, p.slots);
}

// ---- softmax and scores, by a warp -------------------------------------------------------------

// Softmax of logit(0) ... logit(size - 1).
template <class C, class Logit> __device__ Softmax<C> softmax(std::int64_t size,
                                                              const Logit& logit) {
  Softmax<C> parts;
  C max = kLowest<C>, sum = 0;
  for (std::int64_t i = lane(); i < size; i += kWarp) {
    const C x = logit(i);
    max = x > max ? x : max;
  }
  parts.set_max(warp_max(max));
  for (std::int64_t i = lane(); i < size; i += kWarp) sum += own_exp(logit(i) - parts.max);
  parts.set_sum(warp_sum(sum));
  return parts;
}

// The same of a row, which becomes its probabilities. What is beyond it is -infinity before.
template <class S, int kPerLane>
__device__ Softmax<Compute<S>> softmax(WarpRow<S, kPerLane>& row) {
  using C = Compute<S>;
  Softmax<C> parts;
  C max = kLowest<C>, sum = 0;
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

template <class C> __device__ C score_in_row(Score score, C x, const Softmax<C>& parts) {
  return score == Score::Softmax ? parts.probability(x) : score_of(score, x);
}

// Of the scores of a row that are no softmax: 1 / S and sum_f h_f s_f / S of gate_kernel.h. Loops
// over scores are not unrolled: each score is a hundred instructions.
template <class C> struct ScoreSums {
  C factor, mean;

  template <class S> __device__ ScoreSums(Score score, const S* x, const C* h,
                                          std::int64_t experts) {
    C sum = 0, of_h = 0;
#pragma unroll 1
    for (std::int64_t e = lane(); e < experts; e += kWarp) {
      const C value = score_of(score, load(x[e]));
      sum += value;
      if (h) of_h += h[e] * value;
    }
    factor = inverse_or_zero(warp_sum(sum));
    mean = h ? factor * warp_sum(of_h) : 0;
  }
};

// The expert in a slot of a token, -1 for none, and its logit.
template <class C> struct Slot {
  std::int64_t expert = -1;
  C logit = kLowest<C>;  // as that of none: adds nothing to a softmax

  Slot() = default;
  template <class S>
  __device__ Slot(const S* logits, std::int64_t experts, std::int64_t expert) : expert(expert) {
    if (is_within(experts))
      logit = load(logits[expert]);
    else if (expert != -1)
      logit = static_cast<C>(__builtin_nan(""));
  }
  __device__ bool is_within(std::int64_t experts) const { return 0 <= expert && expert < experts; }
};

// What the weights of a token's slots, slot_at(0) ... slot_at(slots - 1), have in common.
template <class C> struct Weigher {
  const GateWeights<C>& weighing;
  Softmax<C> parts;  // of all experts, unless it is the softmax of the slots
  C all = 1;         // what scores are divided by

  template <class SlotAt>
  __device__ Weigher(const GateWeights<C>& weighing, const Softmax<C>& of_row, std::int64_t slots,
                     const SlotAt& slot_at)
      : weighing(weighing), parts(of_row) {
    if (weighing.of_slots())
      parts = softmax<C>(slots, [&](std::int64_t j) { return slot_at(j).logit; });
  }
  __device__ C score(const Slot<C>& slot) const {
    return slot.expert == -1 ? C{0} : score_in_row(weighing.score, slot.logit, parts);
  }
  // Before what follows: the sum of the slots' scores.
  __device__ void set_sum(C sum) { all = weighing.of_slots() ? C{1} : divisor(weighing, sum); }

  __device__ C weight(const Slot<C>& slot, C score) const {
    return slot.expert == -1 ? C{0} : weighing.scale * (score / all);
  }

  // Of a slot whose weight has the gradient v: its part of a sum over the slots, `mean`, and then
  // its share in the gradient of its logit, but for what the softmax of all experts adds to each.
  __device__ C part_of_mean(C score, C v) const {
    return weighing.renormalize ? v * (score / all) : C{0};
  }
  __device__ C share(const Slot<C>& slot, C score, C v, C mean) const {
    if (slot.expert == -1) return 0;
    const C slope = weighing.score == Score::Softmax ? score : slope_of(weighing.score, slot.logit);
    return slope * (weighing.scale * ((v - mean) / all));
  }
};

// Whether the softmax of all experts is needed: for weights, and for the gradient.
template <class C> __device__ bool by_softmax(const GateWeights<C>& p) {
  return p.score == Score::Softmax && !p.of_slots();
}
template <class S> __device__ bool by_softmax(const GateBackward<S>& p) {
  return p.grad_lse || by_softmax(p.weighing) ||
         (p.weighing.score == Score::Softmax && p.grad_score_sums);
}

// ---- forward: tokens of a thread block ---------------------------------------------------------

// The group of token `first`, and where its part of the block that ends at `past` ends. From one
// segment to the next the group grows, whatever the offsets.
struct Segment {
  std::int64_t group, past;
};
template <class Params>
__device__ Segment segment_from(const Params& p, std::int64_t first, std::int64_t past) {
  const std::int64_t group = group_of(p, first);
  return {group, group == p.groups - 1 ? past : smaller(group_end(p, group), past)};
}

// How many tokens of a segment are valid, by the first warp of a block.
template <class S> __device__ void count_tokens(const Gate<S>& p, std::int64_t segment,
                                                std::int64_t first, std::int64_t past) {
  if (warp() != 0) return;
  int valid = 0;
  for (std::int64_t t = first + lane(); t < past; t += kWarp) valid += !is_masked(p, t);
  valid = warp_sum(valid);
  if (lane() == 0) p.partial_tokens[segment] = valid;
}

// Writes the results of a masked token; false if it is not masked.
template <class S> __device__ bool write_masked(const Gate<S>& p, std::int64_t t) {
  if (!is_masked(p, t)) return false;
#pragma unroll 1
  for (std::int64_t j = t * p.slots + lane(); j < (t + 1) * p.slots; j += kWarp) {
    if (p.select) p.indices[j] = -1;
    p.weights[j] = 0;
  }
  if (p.lse && lane() == 0) p.lse[t] = 0;
  return true;
}

}  // namespace
}  // namespace torch_routers
