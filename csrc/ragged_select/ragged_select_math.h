// The decision of ragged_select_kernel.h, shared by CPU and CUDA.
#pragma once

#include "common/score.h"
#include "ragged_select/ragged_select_kernel.h"

namespace torch_routers {

// Of the logits of a token. Where all are -infinity, or one is +infinity, every p is NaN.
template <class T> struct RaggedSums {
  T max;
  T sum;      // of e^(z - max)
  T product;  // of e^(z - max) (z - max)
};

// The last, with 0 ln 0 = 0.
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T ragged_product(T power, T distance) {
  const T product = power * distance;
  return power == 0 ? T{0} : product;
}

template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline std::int64_t ragged_by_top_p(const RaggedSelect<T>& p,
                                                                     std::int64_t token,
                                                                     const RaggedSums<T>& sums) {
  const T* z = p.logits + token * p.experts;
  const std::int64_t* order = p.order + token * p.slots;
  const T limit = static_cast<T>(p.top_p);
  T before = 0;
  std::int64_t count = 0;
  for (; count < p.slots && order[count] >= 0 && order[count] < p.experts; ++count) {
    const T with = before + own_exp(z[order[count]] - sums.max) / sums.sum;
    if (!is_within(p.crossing, before, with, limit) || with != with) break;
    before = with;
  }
  return count;
}

// How many experts a token keeps.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline std::int64_t ragged_count(const RaggedSelect<T>& p,
                                                                  std::int64_t token,
                                                                  const RaggedSums<T>& sums) {
  std::int64_t count = 0;
  if (p.rule == RaggedRule::TopP) {
    count = ragged_by_top_p(p, token, sums);
  } else if (p.rule == RaggedRule::Positive) {
    const std::int64_t* order = p.order + token * p.slots;
    while (count < p.slots && order[count] >= 0 && order[count] < p.experts &&
           p.logits[token * p.experts + order[count]] > 0)
      ++count;
  } else {
    const double sum = static_cast<double>(sums.sum);
    const double value = p.rule == RaggedRule::Entropy
                             ? own_log(sum) - static_cast<double>(sums.product) / sum
                             : 1 / sum;
    std::int64_t step = 0;
    while (step < p.steps && p.thresholds[step] <= value) ++step;
    count = p.counts[step];
  }
  return count < p.least ? p.least : count;
}

}  // namespace torch_routers
