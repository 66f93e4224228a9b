// Formulas of entropy_gate_kernel.h, shared by CPU and CUDA, and the row of a token as `Lanes` share
// it: one lane on the CPU, a warp on CUDA; each takes the experts first, first + step, ..., and sees
// what all of them have by lanes.sum and lanes.max.
#pragma once

#include "common/score.h"
#include "entropy_gate/entropy_gate_kernel.h"

namespace torch_routers {

// Unnamed, for the reason why functions are `static` here: see common/scalar.h.
namespace {

// All entropies come from one sum, that of x u(x) over x = p + epsilon, where
//   u(x) = (1 - x^(q - 1)) / (q - 1),  -ln x for q = 1
// and all slopes, up to what is equal for all experts, are factor(sum) u(x).
template <class T> struct EntropyFormula {
  Entropy entropy;
  bool shannon;
  T epsilon, exponent, inverse;  // q - 1, 1 / (1 - q)
  double q, largest;             // the largest sum, of equal shares
  double missing;  // what sum p'^q lacks to sum p, or the latter to the 1 of the formula

  TORCH_ROUTERS_HOST_DEVICE EntropyFormula(const EntropyRule& rule, std::int64_t experts)
      : entropy(rule.entropy), epsilon(static_cast<T>(rule.epsilon)), q(rule.q), missing(0) {
    const double distance = q < 1 ? 1 - q : q - 1, size = static_cast<double>(experts);
    shannon = distance < 1e-4;
    exponent = static_cast<T>(q - 1);
    inverse = static_cast<T>(1 / (1 - q));
    largest = own_log(size);
    if (shannon) return;
    if (entropy == Entropy::Renyi) {
      missing = size * rule.epsilon + 1e-10;
    } else {
      largest = own_expm1((1 - q) * largest) / (1 - q);
      if (distance >= 1e-2) missing = size * rule.epsilon / (1 - q);
    }
  }

  // u; 0 where x^(q - 1) is not finite, what it is multiplied by being 0.
  template <bool kShannon> TORCH_ROUTERS_HOST_DEVICE T u_of(T x) const {
    constexpr T kSmallest = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
    const T log = own_log(x);
    const T result = kShannon ? -log : own_expm1(exponent * log) * inverse;
    return x < kSmallest ? T{0} : result;
  }
  TORCH_ROUTERS_HOST_DEVICE T u(T x) const { return shannon ? u_of<true>(x) : u_of<false>(x); }

  TORCH_ROUTERS_HOST_DEVICE double value(double sum) const {
    if (shannon || entropy == Entropy::Tsallis) return (sum + missing) / largest;
    return own_log(1 + (missing - (q - 1) * sum)) / ((1 - q) * largest);
  }
  TORCH_ROUTERS_HOST_DEVICE T factor(double sum) const {
    const double power = 1 + (missing - (q - 1) * sum);  // sum p'^q
    if (shannon) return static_cast<T>(1 / largest);
    return static_cast<T>(q / (largest * (entropy == Entropy::Renyi ? power : 1)));
  }
};

// Whether the place of expert e, whose logit has this key, in the descending order of the experts is
// behind another one.
template <class T> struct Place {
  Bits<T> key;
  std::int64_t expert;

  TORCH_ROUTERS_HOST_DEVICE bool behind(const Place& other) const {
    return key < other.key || (key == other.key && expert > other.expert);
  }
};

// Whether an expert is kept that is in place j; before, with: the sums of the probabilities without
// and with it.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline bool is_kept(const EntropyRule& rule, std::int64_t j,
                                                     T before, T with) {
  const bool is_first = j == 0 && rule.crossing != Crossing::Below;
  const bool fits = is_first || is_within(rule.crossing, before, with, static_cast<T>(rule.top_p));
  return fits || j < rule.keep_top_k;
}

template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline bool keeps_all(const EntropyRule& rule, T entropy) {
  return rule.soft && static_cast<double>(entropy) > rule.threshold;
}

// ---- rows ----------------------------------------------------------------------------------------

// The softmax of a row: z to p.
template <class T> struct Probabilities {
  const T* logits;
  T largest, sum;

  template <class Lanes>
  TORCH_ROUTERS_HOST_DEVICE Probabilities(const T* logits, std::int64_t experts, const Lanes& lanes)
      : logits(logits), largest(-static_cast<T>(__builtin_huge_val())), sum(0) {
    for (std::int64_t e = lanes.first; e < experts; e += lanes.step)
      if (logits[e] > largest) largest = logits[e];
    largest = lanes.max(largest);
    for (std::int64_t e = lanes.first; e < experts; e += lanes.step)
      sum += own_exp(logits[e] - largest);
    sum = lanes.sum(sum);
  }
  TORCH_ROUTERS_HOST_DEVICE T operator[](std::int64_t e) const {
    return own_exp(logits[e] - largest) / sum;
  }
};

// Whether a token has no expert: it is masked, or all its logits are -infinity.
template <class T, class Lanes>
TORCH_ROUTERS_HOST_DEVICE static inline bool has_none(const EntropyGateInputs<T>& p,
                                                      std::int64_t token, const Lanes& lanes) {
  if (p.valid && !p.valid[token]) return true;
  bool any = false;
  for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step)
    any = any || p.logits[token * p.experts + e] != -static_cast<T>(__builtin_huge_val());
  return lanes.max(any ? 1.0f : 0.0f) == 0;
}

// The last place that is kept.
template <class T, class Lanes>
TORCH_ROUTERS_HOST_DEVICE static inline Place<T> last_kept(const Probabilities<T>& p,
                                                           std::int64_t experts,
                                                           const EntropyRule& rule,
                                                           const Lanes& lanes) {
  Place<T> last{~Bits<T>{0}, -1};
  T before = 0;
  for (std::int64_t j = 0; j < experts; ++j) {
    Place<T> next{0, experts};  // no logit has the key 0
    for (std::int64_t e = lanes.first; e < experts; e += lanes.step) {
      const Place<T> place{rank_key(p.logits[e]), e};
      if (place.behind(last) && next.behind(place)) next = place;
    }
    next = lanes.best(next);
    const T with = before + p[next.expert];
    if (!is_kept(rule, j, before, with)) break;
    last = next;
    before = with;
  }
  return last;
}

}  // namespace

template <class T, class Lanes>
TORCH_ROUTERS_HOST_DEVICE static inline void entropy_gate_row(const EntropyGate<T>& p,
                                                              std::int64_t token,
                                                              const Lanes& lanes) {
  T* weights = p.weights + token * p.experts;
  const T* logits = p.logits + token * p.experts;
  if (has_none(p, token, lanes)) {
    for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step) weights[e] = 0;
    if (lanes.first == 0) p.entropy[token] = 0;
    return;
  }
  const Probabilities<T> probabilities(logits, p.experts, lanes);
  const EntropyFormula<T> formula(p.rule, p.experts);
  double sum = 0;
  for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step) {
    const T x = probabilities[e] + formula.epsilon;
    sum += static_cast<double>(x * formula.u(x));
  }
  sum = lanes.sum(sum);
  const T entropy = p.experts == 1 ? T{0} : static_cast<T>(formula.value(sum));
  if (lanes.first == 0) p.entropy[token] = entropy;

  const Place<T> last = keeps_all(p.rule, entropy)
                            ? Place<T>{0, p.experts}
                            : last_kept(probabilities, p.experts, p.rule, lanes);
  T kept = 0;
  for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step) {
    const bool is_kept = !Place<T>{rank_key(logits[e]), e}.behind(last);
    weights[e] = is_kept ? probabilities[e] : T{0};
    kept += weights[e];
  }
  if (!p.rule.renormalize) return;
  kept = lanes.sum(kept);
  for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step)
    weights[e] = kept == 0 ? T{0} : weights[e] / kept;
}

template <class T, class Lanes>
TORCH_ROUTERS_HOST_DEVICE static inline void entropy_gate_row(const EntropyGateBackward<T>& p,
                                                              std::int64_t token,
                                                              const Lanes& lanes) {
  const std::int64_t row = token * p.experts;
  const T *logits = p.logits + row, *weights = p.weights + row, *grad = p.grad_weights + row;
  T* grad_logits = p.grad_logits + row;
  if (has_none(p, token, lanes)) {
    for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step) grad_logits[e] = 0;
    return;
  }
  T dot = 0;  // of the weights and their gradient
  for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step)
    if (weights[e] != 0) dot += weights[e] * grad[e];
  dot = lanes.sum(dot);
  const Probabilities<T> probabilities(logits, p.experts, lanes);
  const EntropyFormula<T> formula(p.rule, p.experts);
  const T of_entropy = p.experts == 1 ? T{0} : p.grad_entropy[token];
  double sum = 0, mean = 0;
  if (of_entropy != 0) {
    for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step) {
      const T x = probabilities[e], u = formula.u(x + formula.epsilon);
      sum += static_cast<double>((x + formula.epsilon) * u);
      mean += static_cast<double>(x * u);
    }
    sum = lanes.sum(sum);
    mean = lanes.sum(mean);
  }
  const T scale = of_entropy == 0 ? T{0} : of_entropy * formula.factor(sum);
  for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step) {
    const T x = probabilities[e];
    T result = weights[e] == 0 ? T{0} : weights[e] * grad[e];
    result -= (p.rule.renormalize ? weights[e] : x) * dot;
    if (of_entropy != 0 && x != 0)
      result += scale * x * (formula.u(x + formula.epsilon) - static_cast<T>(mean));
    grad_logits[e] = result;
  }
}

}  // namespace torch_routers
