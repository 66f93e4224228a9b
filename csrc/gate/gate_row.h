// The gate of one token at a time, on the CPU; included by gate_cpu.cpp alone.
#pragma once

#include "common/row.h"
#include "common/select.h"
#include "gate/gate_kernel.h"
#include "gate/gate_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

// What a row is worked on in: on the stack, or where it is long in the scratch of its block.
template <class C> struct Buffers {
  C *x, *scores, *values, *slots;
  SignedBits<C>* keys;
};
template <class C> struct StackBuffers {
  static_assert(GateShape::kRowPadding >= kKeyPadding);
  static constexpr int64_t kSize = GateShape::kStackRow + GateShape::kRowPadding;
  alignas(64) C x[kSize], scores[kSize], values[kSize], slots[kSize];
  alignas(64) SignedBits<C> keys[kSize];

  Buffers<C> get(const GateShape& shape, C* scratch, int64_t block) {
    if (!scratch) return {x, scores, values, slots, keys};
    C* begin = scratch + block * shape.scratch_size();
    const int64_t size = shape.scratch_size() / GateShape::kRows;
    auto* last = reinterpret_cast<SignedBits<C>*>(begin + 4 * size);  // never read as a C
    return {begin, begin + size, begin + 2 * size, begin + 3 * size, last};
  }
};

template <class S> const Compute<S>* load_row(const S* row, int64_t experts, Compute<S>* buffer) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    return row;
  } else {
    for (int64_t e = 0; e < experts; ++e) buffer[e] = load(row[e]);
    return buffer;
  }
}

template <class Params> bool is_masked(const Params& p, int64_t token) {
  return p.valid && !p.valid[token];
}

// ---- scores ------------------------------------------------------------------------------------

// exp(x - max) of a row into `exps`, and the parts of its softmax.
template <class C> Softmax<C> softmax_row(const C* x, int64_t experts, C* exps) {
  Softmax<C> parts;
  parts.set_max(max_row(experts, kLowest<C>, [&](int64_t e) { return x[e]; }));
  for (int64_t e = 0; e < experts; ++e) exps[e] = own_exp(x[e] - parts.max);
  parts.set_sum(sum_row<C>(experts, [&](int64_t e) { return exps[e]; }));
  return parts;
}

// Scores into `scores`, where those of softmax are exponentials already. Their sum.
template <Score kScore, class C>
C score_row(const C* x, int64_t experts, const Softmax<C>& parts, C* scores) {
  if constexpr (kScore == Score::Softmax) {
    for (int64_t e = 0; e < experts; ++e) scores[e] *= parts.scale;
    return 1;
  } else {
    for (int64_t e = 0; e < experts; ++e) scores[e] = score_of(kScore, x[e]);
    return sum_row<C>(experts, [&](int64_t e) { return scores[e]; });
  }
}

template <Score kScore, class C> C score_in_row(C logit, const Softmax<C>& parts) {
  return kScore == Score::Softmax ? parts.probability(logit) : score_of(kScore, logit);
}

// The softmax of a token's slots; `exps` gets its exponentials.
template <class C>
Softmax<C> softmax_of_slots(const C* x, const int64_t* indices, int64_t slots, C* exps) {
  Softmax<C> parts;
  C max = kLowest<C>, sum = 0;
  for (int64_t j = 0; j < slots; ++j) {
    exps[j] = indices[j] < 0 ? kLowest<C> : x[indices[j]];
    max = exps[j] > max ? exps[j] : max;
  }
  parts.set_max(max);
  for (int64_t j = 0; j < slots; ++j) exps[j] = own_exp(exps[j] - parts.max);
  for (int64_t j = 0; j < slots; ++j)
    if (indices[j] >= 0) sum += exps[j];
  parts.set_sum(sum);
  return parts;
}

// ---- forward -----------------------------------------------------------------------------------

template <Score kScore, class S>
void select_row(const Gate<S>& p, const Compute<S>* x, const Buffers<Compute<S>>& b,
                int64_t* best) {
  using C = Compute<S>;
  const auto& s = p.selection;
  const C* scores = x;  // by which groups, and with a bias experts, are compared
  if (s.bias || (s.expert_groups && s.group_best > 1)) {
    Softmax<C> parts;
    if (kScore == Score::Softmax) parts = softmax_row(x, p.experts, b.values);
    score_row<kScore>(x, p.experts, parts, b.values);
    for (int64_t e = 0; s.bias && e < p.experts; ++e) b.values[e] += s.bias[e];
    scores = b.values;
  }
  const C* values = s.bias ? scores : x;
  if (s.expert_groups) {
    const int64_t groups = s.expert_groups, size = p.experts / groups;
    for (int64_t g = 0; g < groups; ++g)
      b.keys[g] = signed_key(
          sum_of_largest(size, s.group_best, [&](int64_t i) { return scores[g * size + i]; }));
    C* better = b.scores;  // number of better groups
    for (int64_t g = 0; g < groups; ++g) {
      int64_t count = 0;
      for (int64_t h = 0; h < groups; ++h)
        count += b.keys[h] > b.keys[g] || (b.keys[h] == b.keys[g] && h < g);
      better[g] = static_cast<C>(count);
    }
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t e = g * size; e < (g + 1) * size; ++e)
        b.keys[e] = better[g] < s.kept_groups ? signed_key(values[e]) : kNoKey<C>;
  } else {
    for (int64_t e = 0; e < p.experts; ++e) b.keys[e] = signed_key(values[e]);
  }
  select_keys(b.keys, p.experts, p.slots, best);
}

template <class S> void write_masked(const Gate<S>& p, int64_t t) {
  for (int64_t j = t * p.slots; j < (t + 1) * p.slots; ++j) {
    if (p.select) p.indices[j] = -1;
    if (p.weighs()) p.weights[j] = 0;
  }
  if (p.lse) p.lse[t] = 0;
}

// The slots that the token does not use.
template <class S> void empty_slots(const Gate<S>& p, int64_t t) {
  for (int64_t j = p.token_top_k ? p.token_top_k[t] : p.slots; j < p.slots; ++j)
    p.indices[t * p.slots + j] = -1;
}

template <Score kScore, class S>
void gate_row(const Gate<S>& p, int64_t t, int64_t segment, const Buffers<Compute<S>>& b) {
  using C = Compute<S>;
  if (is_masked(p, t)) return write_masked(p, t);
  const C* x = load_row(p.logits + t * p.experts, p.experts, b.x);
  int64_t* indices = p.indices + t * p.slots;
  if (p.select) {
    select_row<kScore>(p, x, b, indices);
    empty_slots(p, t);
  }
  if (!p.weighs()) return;

  const bool of_slots = kScore == Score::Softmax && p.weighing.of_slots();
  C* weights = p.weights + t * p.slots;
  Softmax<C> parts;
  if (p.lse || (kScore == Score::Softmax && !of_slots)) parts = softmax_row(x, p.experts, b.scores);
  if (p.lse) {
    p.lse[t] = parts.lse();
    const C factor = inverse_or_zero(score_row<kScore>(x, p.experts, parts, b.scores));
    C* sums = p.partial_sums + segment * p.experts;
    for (int64_t e = 0; e < p.experts; ++e) sums[e] += factor * b.scores[e];
  }
  if (of_slots) {
    parts = softmax_of_slots(x, indices, p.slots, weights);
    for (int64_t j = 0; j < p.slots; ++j)
      weights[j] = indices[j] < 0 ? 0 : p.weighing.scale * (weights[j] * parts.scale);
  } else {
    C sum = 0;
    for (int64_t j = 0; j < p.slots; ++j)
      if (indices[j] >= 0) sum += weights[j] = score_in_row<kScore>(x[indices[j]], parts);
    const C all = divisor(p.weighing, sum);
    for (int64_t j = 0; j < p.slots; ++j)
      weights[j] = indices[j] < 0 ? 0 : p.weighing.scale * (weights[j] / all);
  }
  int64_t* counts = p.partial_counts + segment * p.experts;
  for (int64_t j = 0; j < p.slots; ++j)
    if (indices[j] >= 0) ++counts[indices[j]];
}

// ---- backward ----------------------------------------------------------------------------------

template <Score kScore, class S>
void gate_row(const GateBackward<S>& p, int64_t t, int64_t group, const Buffers<Compute<S>>& b) {
  using C = Compute<S>;
  S* grad_logits = p.grad_logits + t * p.experts;
  if (is_masked(p, t)) {
    for (int64_t e = 0; e < p.experts; ++e) store(grad_logits + e, C{0});
    return;
  }
  const C* x = load_row(p.logits + t * p.experts, p.experts, b.x);
  const int64_t* indices = p.indices + t * p.slots;
  const bool of_slots = kScore == Score::Softmax && p.weighing.of_slots();
  const C* h = p.grad_score_sums ? p.grad_score_sums + group * p.experts : nullptr;
  C* dx = sizeof(S) == sizeof(C) ? reinterpret_cast<C*>(grad_logits) : b.values;

  Softmax<C> parts;
  const bool by_softmax = p.grad_lse || (kScore == Score::Softmax && (h || !of_slots));
  if (by_softmax) {
    parts = softmax_row(x, p.experts, dx);
    for (int64_t e = 0; e < p.experts; ++e) dx[e] *= parts.scale;
  }

  C dot = 0;
  if (p.grad_weights) {  // the slots' shares in the gradient, of logits
    const C* v = p.grad_weights + t * p.slots;
    if (of_slots) {
      const Softmax<C> slots = softmax_of_slots(x, indices, p.slots, b.slots);
      C mean = 0;
      for (int64_t j = 0; j < p.slots; ++j)
        if (indices[j] >= 0) mean += v[j] * (b.slots[j] *= slots.scale);
      for (int64_t j = 0; j < p.slots; ++j)
        if (indices[j] >= 0) b.slots[j] *= p.weighing.scale * (v[j] - mean);
    } else {
      C sum = 0, mean = 0;
      for (int64_t j = 0; j < p.slots; ++j)
        if (indices[j] >= 0) sum += b.slots[j] = score_in_row<kScore>(x[indices[j]], parts);
      const C all = divisor(p.weighing, sum);
      for (int64_t j = 0; p.weighing.renormalize && j < p.slots; ++j)
        if (indices[j] >= 0) mean += v[j] * (b.slots[j] / all);
      for (int64_t j = 0; j < p.slots; ++j) {
        if (indices[j] < 0) continue;
        const C slope = kScore == Score::Softmax ? b.slots[j] : slope_of(kScore, x[indices[j]]);
        b.slots[j] = slope * (p.weighing.scale * ((v[j] - mean) / all));
        if (kScore == Score::Softmax) dot += b.slots[j];
      }
    }
  }

  if (by_softmax && kScore == Score::Softmax) {
    if (h) dot += sum_row<C>(p.experts, [&](int64_t e) { return h[e] * dx[e]; });
    const C constant = (p.grad_lse ? p.grad_lse[t] : 0) - dot;
    if (parts.sum == 0)  // not a product with the infinite gradient of an infinite lse
      for (int64_t e = 0; e < p.experts; ++e) dx[e] = 0;
    else if (h)
      for (int64_t e = 0; e < p.experts; ++e) dx[e] *= h[e] + constant;
    else
      for (int64_t e = 0; e < p.experts; ++e) dx[e] *= constant;
  } else {
    const C q = by_softmax && parts.sum != 0 ? p.grad_lse[t] : 0;
    for (int64_t e = 0; e < p.experts; ++e) dx[e] = q == 0 ? 0 : q * dx[e];
    if (h && kScore != Score::Softmax) {
      const C factor = inverse_or_zero(score_row<kScore>(x, p.experts, parts, b.scores));
      dot = factor * sum_row<C>(p.experts, [&](int64_t e) { return h[e] * b.scores[e]; });
      for (int64_t e = 0; e < p.experts; ++e)
        dx[e] += factor * (h[e] - dot) * slope_of(kScore, x[e]);
    }
  }
  for (int64_t j = 0; p.grad_weights && j < p.slots; ++j)
    if (indices[j] >= 0) dx[indices[j]] += b.slots[j];
  if constexpr (sizeof(S) != sizeof(C))
    for (int64_t e = 0; e < p.experts; ++e) store(grad_logits + e, dx[e]);
}

}  // namespace
}  // namespace torch_routers::TORCH_ROUTERS_ISA
