#include "common/row.h"
#include "common/score.h"
#include "gate/gate_kernel.h"
#include "gate/gate_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

// The experts of the largest logits, largest first. By insertion: most experts of a row lose
// against the last one kept and cost one comparison.
template <class T>
void select(const T* logits, int64_t experts, int64_t slots, int64_t* best) {
  Bits<T> worst = 0;  // of those kept, once all slots are taken
  for (int64_t e = 0; e < experts; ++e) {
    const Bits<T> key = rank_key(logits[e]);
    if (key <= worst) continue;  // of equals the first stays
    int64_t j = e < slots ? e : slots - 1;
    for (; j > 0 && key > rank_key(logits[best[j - 1]]); --j) best[j] = best[j - 1];
    best[j] = e;
    if (e >= slots - 1) worst = rank_key(logits[best[slots - 1]]);
  }
}

// Softmax over the experts into `scores`; returns the parts it was made of.
template <class T> Softmax<T> softmax(const T* logits, int64_t experts, T* scores) {
  Softmax<T> parts;
  parts.set_max(max_row(experts, kLowest<T>, [&](int64_t e) { return logits[e]; }));
  for (int64_t e = 0; e < experts; ++e) scores[e] = own_exp(logits[e] - parts.max);
  parts.set_sum(sum_row<T>(experts, [&](int64_t e) { return scores[e]; }));
  for (int64_t e = 0; e < experts; ++e) scores[e] *= parts.scale;
  return parts;
}

// The same over the experts of a token's slots.
template <class T>
Softmax<T> softmax_of_slots(const T* logits, const int64_t* indices, int64_t slots) {
  Softmax<T> parts;
  T max = kLowest<T>, sum = 0;
  for (int64_t j = 0; j < slots; ++j)
    if (indices[j] >= 0 && logits[indices[j]] > max) max = logits[indices[j]];
  parts.set_max(max);
  for (int64_t j = 0; j < slots; ++j)
    if (indices[j] >= 0) sum += own_exp(logits[indices[j]] - parts.max);
  parts.set_sum(sum);
  return parts;
}

template <class T> void gate_token(const Gate<T>& p, int64_t t, T* scores, int64_t segment) {
  const T* x = p.logits + t * p.experts;
  int64_t* indices = p.indices + t * p.slots;
  T* weights = p.weights + t * p.slots;
  if (p.valid && !p.valid[t]) {
    for (int64_t j = 0; j < p.slots; ++j) {
      if (p.select) indices[j] = -1;
      weights[j] = 0;
    }
    if (p.lse) p.lse[t] = 0;
    return;
  }
  if (p.select) select(x, p.experts, p.slots, indices);

  Softmax<T> parts;
  if (p.lse || !p.renormalize) parts = softmax(x, p.experts, scores);
  if (p.lse) {
    p.lse[t] = parts.lse();
    T* sums = p.partial_sums + segment * p.experts;
    for (int64_t e = 0; e < p.experts; ++e) sums[e] += scores[e];
  }
  if (p.renormalize) parts = softmax_of_slots(x, indices, p.slots);

  int64_t* counts = p.partial_counts + segment * p.experts;
  for (int64_t j = 0; j < p.slots; ++j) {
    const int64_t e = indices[j];
    weights[j] = e < 0 ? 0 : parts.probability(x[e]);
    if (e >= 0) ++counts[e];
  }
}

}  // namespace

template <class T> void gate(const Gate<T>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * p.kBlock, past = smaller(first + p.kBlock, p.tokens);
    int64_t segment = -1;
    for (int64_t t = first, group = group_of(p, first); t < past; ++t) {
      while (t >= group_end(p, group)) ++group;
      if (segment != block + group) {
        segment = block + group;
        for (int64_t e = 0; e < p.experts; ++e) p.partial_counts[segment * p.experts + e] = 0;
        for (int64_t e = 0; p.lse && e < p.experts; ++e)
          p.partial_sums[segment * p.experts + e] = 0;
      }
      gate_token(p, t, p.scores + block * p.experts, segment);
    }
  }
}

template <class T> void gate(const GateCombine<T>& p, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group_begin(p, group), past = group_end(p, group);
    p.group_tokens[group] = past - first;
    for (int64_t t = first; p.valid && t < past; ++t) p.group_tokens[group] -= !p.valid[t];

    const Blocks blocks = blocks_of(first, past);
    for (int64_t e = 0; e < p.experts; ++e) {
      int64_t count = 0;
      double sum = 0;
      for (int64_t block = blocks.first; block < blocks.past; ++block) {
        const int64_t partial = (block + group) * p.experts + e;
        count += p.partial_counts[partial];
        if (p.score_sums) sum += p.partial_sums[partial];
      }
      p.counts[group * p.experts + e] = count;
      if (p.score_sums) p.score_sums[group * p.experts + e] = static_cast<T>(sum);
    }
  }
}

template <class T> void gate(const GateBackward<T>& p, int64_t begin, int64_t end) {
  for (int64_t t = begin, group = group_of(p, begin); t < end; ++t) {
    while (t >= group_end(p, group)) ++group;
    const T* x = p.logits + t * p.experts;
    const T* grad_weights = p.grad_weights ? p.grad_weights + t * p.slots : nullptr;
    const int64_t* indices = p.indices + t * p.slots;
    T* dx = p.grad_logits + t * p.experts;
    const bool masked = p.valid && !p.valid[t];

    if (masked || (p.renormalize && !p.grad_lse && !p.grad_score_sums)) {
      for (int64_t e = 0; e < p.experts; ++e) dx[e] = 0;
      if (masked) continue;
    } else {
      const Softmax<T> parts = softmax(x, p.experts, dx);
      const T* s = p.grad_score_sums ? p.grad_score_sums + group * p.experts : nullptr;
      T dot = s ? sum_row<T>(p.experts, [&](int64_t e) { return s[e] * dx[e]; }) : 0;
      for (int64_t j = 0; grad_weights && !p.renormalize && j < p.slots; ++j)
        if (indices[j] >= 0) dot += grad_weights[j] * parts.probability(x[indices[j]]);
      const T constant = (p.grad_lse ? p.grad_lse[t] : 0) - dot;
      if (parts.sum == 0)  // not a product with the infinite gradient of an infinite lse
        for (int64_t e = 0; e < p.experts; ++e) dx[e] = 0;
      else if (s)
        for (int64_t e = 0; e < p.experts; ++e) dx[e] *= s[e] + constant;
      else
        for (int64_t e = 0; e < p.experts; ++e) dx[e] *= constant;
      for (int64_t j = 0; grad_weights && !p.renormalize && j < p.slots; ++j)
        if (indices[j] >= 0) dx[indices[j]] += grad_weights[j] * parts.probability(x[indices[j]]);
    }
    if (p.renormalize && grad_weights) {
      const Softmax<T> parts = softmax_of_slots(x, indices, p.slots);
      T dot = 0;
      for (int64_t j = 0; j < p.slots; ++j)
        if (indices[j] >= 0) dot += grad_weights[j] * parts.probability(x[indices[j]]);
      for (int64_t j = 0; j < p.slots; ++j)
        if (indices[j] >= 0)
          dx[indices[j]] += parts.probability(x[indices[j]]) * (grad_weights[j] - dot);
    }
  }
}

#define TORCH_ROUTERS_INSTANTIATE(T)                        \
  template void gate(const Gate<T>&, int64_t, int64_t);        \
  template void gate(const GateCombine<T>&, int64_t, int64_t); \
  template void gate(const GateBackward<T>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
