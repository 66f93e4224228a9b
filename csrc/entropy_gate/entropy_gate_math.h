// The row of entropy_gate_kernel.h, written once. `Lanes` are those that share a row: one on the CPU,
// a warp on CUDA; each takes the experts first, first + step, ..., and sees what all of them have by
// lanes.sum and lanes.max.
#pragma once

#include "common/score.h"
#include "entropy_gate/entropy_gate_kernel.h"

namespace torch_routers {

// Unnamed, for the reason why functions are `static` here: see common/scalar.h.
namespace {

// ln x of any x >= 0; what is below the smallest normal number counts as 0.
TORCH_ROUTERS_HOST_DEVICE static inline double log_or_zero(double x) {
  return x < 2.3e-308 ? 0 : own_log(x);
}
// x^y of x >= 0, 0 for x = 0.
TORCH_ROUTERS_HOST_DEVICE static inline double power(double x, double y) {
  return x < 2.3e-308 ? 0 : own_exp(y * own_log(x));
}

// e^x - 1, whose digits do not cancel near 0.
TORCH_ROUTERS_HOST_DEVICE static inline double own_expm1(double x) {
  if (x < -0.125 || x > 0.125) return own_exp(x) - 1;
  double series = 1;  // 1 + x / 2 (1 + x / 3 (...)), the next term below 2^-60
  for (int n = 13; n >= 2; --n) series = 1 + x / n * series;
  return x * series;
}
// x - x^y of x >= 0.
TORCH_ROUTERS_HOST_DEVICE static inline double less_its_power(double x, double y) {
  return x < 2.3e-308 ? 0 : -x * own_expm1((y - 1) * own_log(x));
}

// Entropies as sums over the experts, and their slopes.
struct EntropyFormula {
  Entropy entropy;
  double q, epsilon, largest;
  bool shannon;
  double missing;  // what the sum over p' lacks to a 1 in the numerator

  TORCH_ROUTERS_HOST_DEVICE EntropyFormula(const EntropyRule& rule, std::int64_t experts)
      : entropy(rule.entropy), q(rule.q), epsilon(rule.epsilon), missing(0) {
    const double distance = q < 1 ? 1 - q : q - 1, size = static_cast<double>(experts);
    shannon = distance < 1e-4;
    largest = own_log(size);
    if (entropy == Entropy::Tsallis && !shannon) {
      largest = -own_expm1((1 - q) * largest) / (q - 1);
      if (distance >= 1e-2) missing = -size * epsilon / (q - 1);
    }
  }

  // What an expert adds.
  TORCH_ROUTERS_HOST_DEVICE double term(double p) const {
    const double x = p + epsilon;
    if (shannon) return -x * log_or_zero(x);
    if (entropy == Entropy::Renyi) return power(x, q);
    return less_its_power(x, q) / (q - 1);
  }
  TORCH_ROUTERS_HOST_DEVICE double value(double sum) const {
    if (shannon) return sum / largest;
    if (entropy == Entropy::Renyi) return own_log(sum + 1e-10) / ((1 - q) * largest);
    return (sum + missing) / largest;
  }
  // dH / dp of an expert, up to what is equal for all; `sum` is that of the terms.
  TORCH_ROUTERS_HOST_DEVICE double slope(double p, double sum) const {
    const double x = p + epsilon;
    if (shannon) return -log_or_zero(x) / largest;
    if (entropy == Entropy::Renyi) return q * power(x, q - 1) / ((1 - q) * (sum + 1e-10) * largest);
    return (1 - q * power(x, q - 1)) / ((q - 1) * largest);
  }
};

// The softmax of a row: z to p.
template <class T> struct Probabilities {
  const T* logits;
  std::int64_t experts;
  T largest, sum;
  double wide_sum = 0;

  template <class Lanes>
  TORCH_ROUTERS_HOST_DEVICE Probabilities(const T* logits, std::int64_t experts, const Lanes& lanes)
      : logits(logits), experts(experts), largest(-static_cast<T>(__builtin_huge_val())), sum(0) {
    for (std::int64_t e = lanes.first; e < experts; e += lanes.step)
      if (logits[e] > largest) largest = logits[e];
    largest = lanes.max(largest);
    for (std::int64_t e = lanes.first; e < experts; e += lanes.step)
      wide_sum += static_cast<double>(exponential(e));
    wide_sum = lanes.sum(wide_sum);
    sum = static_cast<T>(wide_sum);
  }
  TORCH_ROUTERS_HOST_DEVICE T exponential(std::int64_t e) const {
    return own_exp(logits[e] - largest);
  }
  TORCH_ROUTERS_HOST_DEVICE T operator[](std::int64_t e) const { return exponential(e) / sum; }
  // For entropies, in which what a sum of rounded probabilities lacks to 1 is divided by q - 1.
  TORCH_ROUTERS_HOST_DEVICE double wide(std::int64_t e) const {
    return static_cast<double>(exponential(e)) / wide_sum;
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

// A place in the descending order of the experts.
template <class T> struct Place {
  Bits<T> key;
  std::int64_t expert;

  // Whether this comes behind another one.
  TORCH_ROUTERS_HOST_DEVICE bool behind(const Place& other) const {
    return key < other.key || (key == other.key && expert > other.expert);
  }
};

// The last place that is kept.
template <class T, class Lanes>
TORCH_ROUTERS_HOST_DEVICE static inline Place<T> last_kept(const Probabilities<T>& p,
                                                           const EntropyRule& rule,
                                                           const Lanes& lanes) {
  Place<T> last{~Bits<T>{0}, -1};
  T before = 0;  // the sum of the probabilities so far
  for (std::int64_t j = 0; j < p.experts; ++j) {
    Place<T> next{0, p.experts};  // no logit has the key 0
    for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step) {
      const Place<T> place{rank_key(p.logits[e]), e};
      if (place.behind(last) && next.behind(place)) next = place;
    }
    next = lanes.best(next);
    const T with = before + p[next.expert];
    const T limit = static_cast<T>(rule.top_p);
    const bool fits = rule.crossing == Crossing::Below      ? with <= limit
                      : rule.crossing == Crossing::Reaching ? j == 0 || before < limit
                                                            : j == 0 || before <= limit;
    if (!fits && j >= rule.keep_top_k) break;
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
  const EntropyFormula formula(p.rule, p.experts);
  double sum = 0;
  for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step)
    sum += formula.term(probabilities.wide(e));
  const double entropy = p.experts == 1 ? 0 : formula.value(lanes.sum(sum));
  if (lanes.first == 0) p.entropy[token] = static_cast<T>(entropy);

  const bool all = p.rule.soft && static_cast<double>(static_cast<T>(entropy)) > p.rule.threshold;
  const Place<T> last = all ? Place<T>{0, p.experts} : last_kept(probabilities, p.rule, lanes);
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
  const EntropyFormula formula(p.rule, p.experts);
  const double of_entropy = p.experts == 1 ? 0 : static_cast<double>(p.grad_entropy[token]);
  double sum = 0, mean_slope = 0;
  if (of_entropy != 0) {
    for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step)
      sum += formula.term(probabilities.wide(e));
    sum = lanes.sum(sum);
    for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step) {
      const auto x = probabilities.wide(e);
      if (x != 0) mean_slope += x * formula.slope(x, sum);
    }
    mean_slope = lanes.sum(mean_slope);
  }
  for (std::int64_t e = lanes.first; e < p.experts; e += lanes.step) {
    const T x = probabilities[e];
    T result = weights[e] == 0 ? T{0} : weights[e] * grad[e];
    result -= (p.rule.renormalize ? weights[e] : x) * dot;
    if (of_entropy != 0 && x != 0) {
      const double wide = probabilities.wide(e);
      result += static_cast<T>(of_entropy * wide * (formula.slope(wide, sum) - mean_slope));
    }
    grad_logits[e] = result;
  }
}

}  // namespace torch_routers
