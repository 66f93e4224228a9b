// One warp per token. Up to 1024 experts, in double 512, and 32 slots its row is in registers;
// beyond that it is read again wherever it is needed. In the forward a thread block takes the tokens
// of a block of gate_kernel.h, so that it alone writes the results of its segments. Not run on a GPU
// yet.
//
// Here, unlike on the CPU, nobody has checked the values of indices, token_top_k and group_offsets.
// An index that is no expert's stands for an expert with the logit NaN that is counted nowhere.
// Offsets that do not ascend from 0 to the number of tokens give wrong sums, but no access out of
// bounds.
#include "gate/gate_cuda.cuh"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kBackwardThreads = 128;
constexpr int kLongThreads = 256;
constexpr int kLongChunk = 512;  // experts whose gradient a warp holds
constexpr int kCombineThreads = 256;

// As many warps as 32 KiB of shared memory hold a row for.
template <class S, int kPerLane>
constexpr int kRows = 32768 / static_cast<int>(kWarp * kPerLane * sizeof(Compute<S>));
template <class S, int kPerLane>
constexpr int kForwardThreads = kWarp * (kRows<S, kPerLane> < 16 ? kRows<S, kPerLane> : 16);

// ---- rows that fit into registers --------------------------------------------------------------

template <class S, int kPerLane>
__global__ void __launch_bounds__(kForwardThreads<S, kPerLane>, sizeof(Compute<S>) == 4 ? 2 : 1)
    forward(Gate<S> p) {
  using C = Compute<S>;
  using Row = WarpRow<S, kPerLane>;
  constexpr int kThreads = kForwardThreads<S, kPerLane>, kWarps = kThreads / kWarp;
  __shared__ alignas(16) C sums[kWarps][Row::kSize];
  __shared__ int counts[Row::kSize];
  const int experts = static_cast<int>(p.experts), slots = static_cast<int>(p.slots);
  const int64_t block = blockIdx.x, block_past = smaller((block + 1) * p.kBlock, p.tokens);
  const Score score = p.weighing.score;

  for (int64_t first = block * p.kBlock; first < block_past;) {
    const Segment segment = segment_from(p, first, block_past);
    for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = 0;
    __syncthreads();  // also: the sums of the last segment have been read
    count_tokens(p, block + segment.group, first, segment.past);
    C *all = sums[warp()], *own = Row::own(all);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) own[Row::offset(i)] = 0;
    __syncwarp();

    for (int64_t t = first + warp(); t < segment.past; t += kWarps) {
      if (write_masked(p, t)) continue;
      const S* x = p.logits + t * p.experts;
      const bool has_slot = lane() < slots;
      int64_t* index = p.indices + t * p.slots + lane();
      int64_t expert = has_slot && !p.select ? *index : -1;
      Row row;
      if (p.select) {
        row.load(x, experts, kLowest<C>);
        Bits<C> keys[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) keys[i] = rank_key(row.values[i]);
        expert = warp_select<Row>(keys, static_cast<int>(filled_slots(p, t)));
        if (has_slot) *index = expert;
      }
      const Slot<C> slot(x, experts, expert);

      Softmax<C> parts{};
      if (p.lse || by_softmax(p.weighing)) {
        row.load(x, experts, kLowest<C>);  // again: held meanwhile, it would cost registers
        parts = softmax(row);
        if (p.lse && lane() == 0) p.lse[t] = parts.lse();
      }
      if (p.lse && score == Score::Softmax) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) own[Row::offset(i)] += row.values[i];
      } else if (p.lse) {
        const ScoreSums<C> of_row(score, x, static_cast<const C*>(nullptr), experts);
#pragma unroll 1
        for (int e = lane(); e < experts; e += kWarp)
          all[e] += of_row.factor * score_of(score, load(x[e]));
      }
      Weigher<C> weigher(p.weighing, parts, slots, [&](int64_t) { return slot; });
      const C slot_score = weigher.score(slot);
      weigher.set_sum(warp_sum(slot_score));
      if (has_slot) p.weights[t * p.slots + lane()] = weigher.weight(slot, slot_score);
      if (slot.is_within(experts)) atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += kThreads) {
      const int64_t partial = (block + segment.group) * p.experts + e;
      p.partial_counts[partial] = counts[e];
      C total = 0;
#pragma unroll 1
      for (int w = 0; p.lse && w < kWarps; ++w) total += sums[w][e];
      if (p.lse) p.partial_sums[partial] = total;
    }
    first = segment.past;
  }
}

template <class S, int kPerLane>
__global__ void __launch_bounds__(kBackwardThreads) backward(GateBackward<S> p) {
  using C = Compute<S>;
  using Row = WarpRow<S, kPerLane>;
  constexpr int kWarps = kBackwardThreads / kWarp;
  __shared__ alignas(16) C rows[kWarps][Row::kSize];
  const int64_t t = int64_t{blockIdx.x} * kWarps + warp();
  if (t >= p.tokens) return;
  const int experts = static_cast<int>(p.experts), slots = static_cast<int>(p.slots);
  const S* x = p.logits + t * p.experts;
  const C* h = p.grad_score_sums ? p.grad_score_sums + group_of(p, t) * p.experts : nullptr;
  const bool valid = !is_masked(p, t), is_softmax = p.weighing.score == Score::Softmax;

  Row row;
  row.fill(0);
  if (valid) {
    Softmax<C> parts{};
    if (by_softmax(p)) {
      row.load(x, experts, kLowest<C>);
      parts = softmax(row);
    }
    Slot<C> slot;
    C v = 0, share = 0, dot = 0;
    if (p.grad_weights) {
      if (lane() < slots) slot = Slot<C>(x, experts, p.indices[t * p.slots + lane()]);
      if (slot.expert != -1) v = p.grad_weights[t * p.slots + lane()];
      Weigher<C> weigher(p.weighing, parts, slots, [&](int64_t) { return slot; });
      const C score = weigher.score(slot);
      weigher.set_sum(warp_sum(score));
      share = weigher.share(slot, score, v, warp_sum(weigher.part_of_mean(score, v)));
      if (by_softmax(p.weighing)) dot = share;
    }

    if (by_softmax(p) && is_softmax) {
      Row s;
      s.fill(0);
      if (h) s.load(h, experts, C{0});
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) dot += s.values[i] * row.values[i];
      const C constant = (p.grad_lse ? p.grad_lse[t] : C{0}) - warp_sum(dot);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        row.values[i] = parts.sum == 0 ? C{0} : row.values[i] * (s.values[i] + constant);
    } else {
      const C q = p.grad_lse && parts.sum != 0 ? p.grad_lse[t] : C{0};
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) row.values[i] = q == 0 ? C{0} : q * row.values[i];
    }

    // What is anywhere in the row is added in shared memory.
    C *all = rows[warp()], *own = Row::own(all);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) own[Row::offset(i)] = row.values[i];
    __syncwarp();
    if (h && !is_softmax) {
      const ScoreSums<C> of_row(p.weighing.score, x, h, experts);
#pragma unroll 1
      for (int e = lane(); e < experts; e += kWarp)
        all[e] += of_row.factor * (h[e] - of_row.mean) * slope_of(p.weighing.score, load(x[e]));
      __syncwarp();
    }
    if (warp_add_duplicates(slot.is_within(experts) ? slot.expert : -1, share))
      all[slot.expert] += share;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row.values[i] = own[Row::offset(i)];
  }
  row.store(p.grad_logits + t * p.experts, experts);
}

// ---- rows of any length ------------------------------------------------------------------------

template <class S> __global__ void __launch_bounds__(kLongThreads) forward_long(Gate<S> p) {
  using C = Compute<S>;
  __shared__ Softmax<C> softmaxes[GateShape::kBlock];
  __shared__ C factors[GateShape::kBlock];
  const int64_t block = blockIdx.x, block_past = smaller((block + 1) * p.kBlock, p.tokens);
  const Score score = p.weighing.score;

  for (int64_t first = block * p.kBlock; first < block_past;) {
    const Segment segment = segment_from(p, first, block_past);
    const int64_t partial = (block + segment.group) * p.experts;
    int64_t* counts = p.partial_counts + partial;
    for (int64_t e = threadIdx.x; e < p.experts; e += kLongThreads) counts[e] = 0;
    __syncthreads();  // also: the softmaxes of the last segment have been read
    count_tokens(p, block + segment.group, first, segment.past);
    for (int64_t t = first + warp(); t < segment.past; t += kLongThreads / kWarp) {
      if (write_masked(p, t)) continue;
      const S* x = p.logits + t * p.experts;
      const int64_t* indices = p.indices + t * p.slots;
      const auto slot_at = [&](int64_t j) { return Slot<C>(x, p.experts, indices[j]); };
      Softmax<C> parts{};
      if (p.lse || by_softmax(p.weighing))
        parts = softmax<C>(p.experts, [&](int64_t e) { return load(x[e]); });
      if (p.lse) {
        C factor = 1;
        if (score != Score::Softmax)
          factor = ScoreSums<C>(score, x, static_cast<const C*>(nullptr), p.experts).factor;
        if (lane() == 0) {
          p.lse[t] = parts.lse();
          softmaxes[t % p.kBlock] = parts;
          factors[t % p.kBlock] = factor;
        }
      }
      Weigher<C> weigher(p.weighing, parts, p.slots, slot_at);
      C sum = 0;
      for (int64_t j = lane(); j < p.slots; j += kWarp) {
        const C slot_score = weigher.score(slot_at(j));
        p.weights[t * p.slots + j] = slot_score;  // read back by this lane
        sum += slot_score;
      }
      weigher.set_sum(warp_sum(sum));
      for (int64_t j = lane(); j < p.slots; j += kWarp) {
        const Slot<C> slot = slot_at(j);
        p.weights[t * p.slots + j] = weigher.weight(slot, p.weights[t * p.slots + j]);
        if (slot.is_within(p.experts))
          atomicAdd(reinterpret_cast<unsigned long long*>(counts + slot.expert), 1ull);
      }
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; p.lse && e < p.experts; e += kLongThreads) {
      C sum = 0;  // of the scores, made once more
      for (int64_t t = first; t < segment.past; ++t)
        if (!is_masked(p, t)) {
          const C x = load(p.logits[t * p.experts + e]);
          sum += factors[t % p.kBlock] * score_in_row(score, x, softmaxes[t % p.kBlock]);
        }
      p.partial_sums[partial + e] = sum;
    }
    first = segment.past;
  }
}

// The gradient of a row is made in parts in shared memory, that it be rounded once.
template <class S>
__global__ void __launch_bounds__(kBackwardThreads, 4) backward_long(GateBackward<S> p) {
  using C = Compute<S>;
  constexpr int kWarps = kBackwardThreads / kWarp;
  __shared__ C chunks[kWarps][kLongChunk];
  const int64_t t = int64_t{blockIdx.x} * kWarps + warp();
  if (t >= p.tokens) return;
  const S* x = p.logits + t * p.experts;
  S* dx = p.grad_logits + t * p.experts;
  if (is_masked(p, t)) {
    for (int64_t e = lane(); e < p.experts; e += kWarp) store(dx + e, C{0});
    return;
  }
  const Score score = p.weighing.score;
  const C* h = p.grad_score_sums ? p.grad_score_sums + group_of(p, t) * p.experts : nullptr;
  const int64_t slots = p.grad_weights ? p.slots : 0;
  const auto slot_at = [&](int64_t j) { return Slot<C>(x, p.experts, p.indices[t * p.slots + j]); };
  const auto grad_at = [&](int64_t j) { return p.grad_weights[t * p.slots + j]; };

  Softmax<C> parts{};
  if (by_softmax(p)) parts = softmax<C>(p.experts, [&](int64_t e) { return load(x[e]); });
  Weigher<C> weigher(p.weighing, parts, slots, slot_at);
  C sum = 0, dot = 0, mean = 0;
#pragma unroll 1
  for (int64_t j = lane(); j < slots; j += kWarp) sum += weigher.score(slot_at(j));
  weigher.set_sum(warp_sum(sum));
  const auto share_at = [&](int64_t j) {
    const Slot<C> slot = slot_at(j);
    return slot.expert == -1 ? C{0} : weigher.share(slot, weigher.score(slot), grad_at(j), mean);
  };
#pragma unroll 1
  for (int64_t j = lane(); p.weighing.renormalize && j < slots; j += kWarp)
    if (const Slot<C> slot = slot_at(j); slot.expert != -1)
      mean += weigher.part_of_mean(weigher.score(slot), grad_at(j));
  mean = warp_sum(mean);
#pragma unroll 1
  for (int64_t j = lane(); by_softmax(p.weighing) && j < slots; j += kWarp) dot += share_at(j);
  ScoreSums<C> of_row(score, x, h, score == Score::Softmax || !h ? 0 : p.experts);
  for (int64_t e = lane(); score == Score::Softmax && h && e < p.experts; e += kWarp)
    dot += h[e] * parts.probability(load(x[e]));
  const C constant = (p.grad_lse && parts.sum != 0 ? p.grad_lse[t] : C{0}) - warp_sum(dot);
  const auto without_slots = [&](int64_t e) {
    const C logit = load(x[e]), of_h = h ? h[e] : C{0};
    C result = 0;
    if (score == Score::Softmax && by_softmax(p))
      return parts.sum == 0 ? C{0} : parts.probability(logit) * (of_h + constant);
    if (constant != 0) result = constant * parts.probability(logit);
    if (h && score != Score::Softmax)
      result += of_row.factor * (of_h - of_row.mean) * slope_of(score, logit);
    return result;
  };

  C* chunk = chunks[warp()];
  for (int64_t first = 0; first < p.experts; first += kLongChunk) {
    const int64_t past = smaller(first + kLongChunk, p.experts);
#pragma unroll 1
    for (int64_t e = first + lane(); e < past; e += kWarp) chunk[e - first] = without_slots(e);
    __syncwarp();
#pragma unroll 1
    for (int64_t j = lane(); j - lane() < slots; j += kWarp) {
      const int64_t expert = j < slots ? slot_at(j).expert : -1;
      const bool is_here = first <= expert && expert < past;
      C share = is_here ? share_at(j) : C{0};
      if (warp_add_duplicates(is_here ? expert : -1, share)) chunk[expert - first] += share;
      __syncwarp();
    }
    for (int64_t e = first + lane(); e < past; e += kWarp) store(dx + e, chunk[e - first]);
    __syncwarp();
  }
}

// ---- from segments to groups -------------------------------------------------------------------

TORCH_ROUTERS_HOST_DEVICE int64_t chunks(const GateShape& shape) {
  return (shape.experts + kWarp - 1) / kWarp;
}

// A lane per expert; the warps share the segments of a group.
template <class C> __global__ void __launch_bounds__(kCombineThreads) combine(GateCombine<C> p) {
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
    valid += p.partial_tokens[b + group];
  }

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
  if (p.score_sums) p.score_sums[group * p.experts + e] = static_cast<C>(sum);
}

// ---- launching ---------------------------------------------------------------------------------

// With the kernel that holds kPerLane experts in a lane, or twice as many, and so on.
template <int kPerLane = 1, class S> void launch_rows(const Gate<S>& p, void* stream) {
  if constexpr (kPerLane > kMostPerLane<S>)
    launch("gate", forward_long<S>, p.blocks(), kLongThreads, stream, p);
  else if (!is_short<S>(p) || p.experts > kPerLane * kWarp)
    launch_rows<2 * kPerLane>(p, stream);
  else
    launch("gate", forward<S, kPerLane>, p.blocks(), kForwardThreads<S, kPerLane>, stream, p);
}
template <int kPerLane = 1, class S> void launch_rows(const GateBackward<S>& p, void* stream) {
  const int64_t blocks = (p.tokens * kWarp + kBackwardThreads - 1) / kBackwardThreads;
  if constexpr (kPerLane > kMostPerLane<S>)
    launch("gate", backward_long<S>, blocks, kBackwardThreads, stream, p);
  else if (!is_short<S>(p) || p.experts > kPerLane * kWarp)
    launch_rows<2 * kPerLane>(p, stream);
  else
    launch("gate", backward<S, kPerLane>, blocks, kBackwardThreads, stream, p);
}

}  // namespace

template <class S> void gate_cuda(const Gate<S>& p, void* stream) {
  Gate<S> rest = p;
  if (p.select && !(p.weights && p.selection.by_logits() && is_short<S>(p))) {
    gate_select_cuda(p, stream);
    rest.select = false;
  }
  if (p.weights) launch_rows(rest, stream);
}
template <class C> void gate_cuda(const GateCombine<C>& p, void* stream) {
  launch("gate", combine<C>, p.groups * chunks(p), kCombineThreads, stream, p);
}
template <class S> void gate_cuda(const GateBackward<S>& p, void* stream) {
  launch_rows(p, stream);
}

#define TORCH_ROUTERS_INSTANTIATE(S)              \
  template void gate_cuda(const Gate<S>&, void*); \
  template void gate_cuda(const GateBackward<S>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)
template void gate_cuda(const GateCombine<float>&, void*);
template void gate_cuda(const GateCombine<double>&, void*);

}  // namespace torch_routers
