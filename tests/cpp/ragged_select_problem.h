// Inputs and results of ragged_select, in the memory of the CPU or of a device.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "common/score.h"
#include "host_array.h"
#include "ragged_select/ragged_select_kernel.h"

namespace torch_routers {

template <class T> struct RaggedProblem {
  std::int64_t tokens, experts, slots;
  RaggedRule rule = RaggedRule::TopP;
  double top_p = 0.8;
  Crossing crossing = Crossing::Exceeding;
  std::int64_t least = 1;
  std::vector<double> thresholds;
  std::vector<std::int64_t> counts{1};
  std::vector<T> logits;
  std::vector<std::int64_t> order;

  // Every third token from the second on is masked.
  RaggedProblem(std::int64_t tokens, std::int64_t experts, std::int64_t slots)
      : tokens(tokens), experts(experts), slots(slots) {
    std::mt19937 random(static_cast<unsigned>(tokens * 1000 + experts));
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < tokens * experts; ++i)
      logits.push_back(static_cast<T>(2 * normal(random)));
    // Ties, as of logits that were rounded.
    for (std::int64_t i = 0; i < tokens * experts; i += 2)
      logits[i] = static_cast<T>(static_cast<int>(logits[i]));
    sort();
    for (std::int64_t t = 1; t < tokens; t += 3) std::fill_n(order.begin() + t * slots, slots, -1);
  }

  // One token.
  explicit RaggedProblem(const std::vector<T>& logits)
      : tokens(1),
        experts(static_cast<std::int64_t>(logits.size())),
        slots(experts),
        logits(logits) {
    sort();
  }

  // The order of these logits; of equals the lower index comes first.
  void sort() {
    order.resize(tokens * slots);
    std::vector<std::int64_t> row(experts);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const T* z = logits.data() + t * experts;
      std::iota(row.begin(), row.end(), 0);
      std::stable_sort(row.begin(), row.end(), [&](std::int64_t a, std::int64_t b) {
        return rank_key(z[a]) > rank_key(z[b]);
      });
      std::copy_n(row.begin(), slots, order.begin() + t * slots);
    }
  }

  // `run(params, tokens)` runs the kernel; the result is the indices.
  template <template <class> class Array, class Run>
  std::vector<std::int64_t> run(const Run& run) const {
    const Array<T> z(logits);
    const Array<double> limits(thresholds);
    const Array<std::int64_t> given(order), numbers(counts), indices(order.size());
    run(RaggedSelect<T>{tokens, experts, slots, z.data(), given.data(), rule, top_p, crossing,
                        least, static_cast<std::int64_t>(thresholds.size()), limits.data(),
                        numbers.data(), indices.data()},
        tokens);
    return indices.to_host();
  }
};

}  // namespace torch_routers
