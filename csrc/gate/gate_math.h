// Formulas of gate_kernel.h shared by CPU and CUDA: a softmax from its parts, scores of one logit,
// groups of experts, groups and blocks of tokens.
#pragma once

#include "common/score.h"
#include "gate/gate_kernel.h"

namespace torch_routers {

template <class T> static constexpr T kLowest = -__builtin_huge_val();

// Unnamed, for the reason why functions are `static` here: see common/scalar.h.
namespace {

// p_e = exp(x_e - max) / sum. Of a row that is -infinity everywhere, sum and all p are 0.
template <class T> struct Softmax {
  T max, sum, scale;

  TORCH_ROUTERS_HOST_DEVICE void set_max(T value) { max = value == kLowest<T> ? T{0} : value; }
  TORCH_ROUTERS_HOST_DEVICE void set_sum(T value) {
    sum = value;
    scale = sum == 0 ? T{0} : 1 / sum;
  }
  TORCH_ROUTERS_HOST_DEVICE T probability(T logit) const { return own_exp(logit - max) * scale; }
  TORCH_ROUTERS_HOST_DEVICE T lse() const {
    return sum == 0 ? kLowest<T> : static_cast<T>(max + own_log(static_cast<double>(sum)));
  }
};

}  // namespace

// The scores of which each depends on its logit alone, and their derivatives.
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T score_of(Score score, T x) {
  return score == Score::Sigmoid ? sigmoid(x) : score == Score::SqrtSoftplus ? sqrt_softplus(x) : x;
}
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T slope_of(Score score, T x) {
  return score == Score::Sigmoid ? sigmoid_slope(x) : sqrt_softplus_slope(x);
}

template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T inverse_or_zero(T x) {
  return x == 0 ? T{0} : T{1} / x;
}

// What the scores of a token's slots, whose sum is `sum`, are divided by.
template <class C>
TORCH_ROUTERS_HOST_DEVICE static inline C divisor(const GateWeights<C>& p, C sum) {
  return p.renormalize && sum + p.epsilon != 0 ? sum + p.epsilon : 1;
}

// The sum of the `count` largest of value(0) ... value(size - 1), largest first.
template <class Value>
TORCH_ROUTERS_HOST_DEVICE static inline auto sum_of_largest(std::int64_t size, std::int64_t count,
                                                            const Value& value) {
  using T = decltype(value(0));
  T sum = 0;
  Bits<T> last = 0;
  std::int64_t at = -1;  // of the last one added
  for (std::int64_t j = 0; j < count; ++j) {
    Bits<T> best = 0;
    T best_value = 0;
    std::int64_t best_at = -1;
    for (std::int64_t i = 0; i < size; ++i) {
      const T candidate = value(i);
      const Bits<T> key = rank_key(candidate);
      const bool is_left = at < 0 || key < last || (key == last && i > at);
      if (is_left && key > best) best = key, best_value = candidate, best_at = i;
    }
    sum += best_value;
    last = best, at = best_at;
  }
  return sum;
}

TORCH_ROUTERS_HOST_DEVICE static inline std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

template <class Params>
TORCH_ROUTERS_HOST_DEVICE static inline std::int64_t group_begin(const Params& p,
                                                                 std::int64_t group) {
  return p.group_offsets ? p.group_offsets[group] : 0;
}

template <class Params>
TORCH_ROUTERS_HOST_DEVICE static inline std::int64_t group_end(const Params& p,
                                                               std::int64_t group) {
  return p.group_offsets ? p.group_offsets[group + 1] : p.tokens;
}

// The group of a token.
template <class Params>
TORCH_ROUTERS_HOST_DEVICE static inline std::int64_t group_of(const Params& p, std::int64_t token) {
  std::int64_t low = 0, high = p.groups - 1;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (token < group_end(p, middle))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The blocks that tokens [first, past) are in.
struct Blocks {
  std::int64_t first, past;
};
TORCH_ROUTERS_HOST_DEVICE static inline Blocks blocks_of(std::int64_t first, std::int64_t past) {
  const std::int64_t block = first / GateShape::kBlock;
  return {block, first < past ? (past - 1) / GateShape::kBlock + 1 : block};
}

}  // namespace torch_routers
