// Formulas of router_losses_kernel.h shared by CPU and CUDA.
#pragma once

#include "common/scalar.h"
#include "router_losses/router_losses_kernel.h"

namespace torch_routers {

TORCH_ROUTERS_HOST_DEVICE static inline double at_least_one(double x) { return x < 1 ? 1 : x; }

TORCH_ROUTERS_HOST_DEVICE static inline double square_of_lse(double lse) {
  return lse == -__builtin_huge_val() ? 0 : lse * lse;
}

TORCH_ROUTERS_HOST_DEVICE static inline double slope_of_lse(double slope, double lse) {
  return lse == -__builtin_huge_val() ? 0 : slope * lse;
}

// The sum over the groups of a set of what an array [groups, experts] has for an expert. In double,
// where counts are exact to 2^53 and no value that a caller may pass overflows.
template <class Element>
TORCH_ROUTERS_HOST_DEVICE static inline double sum_of_set(const RouterLossesShape& p,
                                                          const Element* array, std::int64_t set,
                                                          std::int64_t expert) {
  double sum = 0;
  const std::int64_t first = set * p.groups_per_set();
  for (std::int64_t g = first; g < first + p.groups_per_set(); ++g)
    sum += static_cast<double>(array[g * p.experts + expert]);
  return sum;
}

// The same over all groups.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline double score_sum(const RouterLosses<T>& p,
                                                         std::int64_t expert) {
  double sum = 0;
  for (std::int64_t g = 0; g < p.groups; ++g) sum += p.score_sums[g * p.experts + expert];
  return sum;
}

// What E sum_e c_e s_e is divided by, for a set with these tokens and slots.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline double balance_divisor(const RouterLosses<T>& p,
                                                               double tokens, double slots) {
  return at_least_one(p.switch_convention ? tokens : slots) * at_least_one(tokens);
}

// Unnamed, for the reason why functions are `static` here: see common/scalar.h.
namespace {

// The importance loss and its slopes, from the mean of the score sums and their squared deviations.
struct Importance {
  double mean, variance, divisor;

  template <class T>
  TORCH_ROUTERS_HOST_DEVICE Importance(const RouterLosses<T>& p, double mean, double deviations)
      : mean(mean),
        divisor(at_least_one(static_cast<double>(p.unbiased ? p.experts - 1 : p.experts))) {
    variance = deviations / divisor;
  }
  TORCH_ROUTERS_HOST_DEVICE double value() const {
    return mean == 0 ? 0 : variance / (mean * mean);
  }
  TORCH_ROUTERS_HOST_DEVICE double slope(double score_sum, std::int64_t experts) const {
    if (mean == 0) return 0;
    const double of_mean = variance / (static_cast<double>(experts) * mean);
    return 2 * ((score_sum - mean) / divisor - of_mean) / (mean * mean);
  }
};

}  // namespace

// Writes the total and the three losses.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline void write_losses(const RouterLosses<T>& p, double balance,
                                                          double z, double importance) {
  *p.total = static_cast<T>(p.balance_weight * balance + p.z_weight * z +
                            p.importance_weight * importance);
  p.values[0] = static_cast<T>(balance);
  p.values[1] = static_cast<T>(z);
  p.values[2] = static_cast<T>(importance);
}

}  // namespace torch_routers
