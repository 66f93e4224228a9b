// Tokens, slots and rows that lie beyond 2^31 elements: the same results as those tokens and rows alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "sparse.h"
#include "token_dispatch/token_dispatch_kernel.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int64_t kSlots = 8, kHidden = 8, kLast = 10, kLastRows = 64;

// All results of the last tokens, whose rows are the last, one after the other; none if there is no
// room.
std::vector<float> results_of_the_last(int64_t tokens) {
  const int64_t rows = std::max(tokens, kLastRows), slots = tokens * kSlots, first = tokens - kLast;
  const int64_t first_slot = first * kSlots, first_row = rows - kLastRows;
  const Sparse<int64_t> order(rows), inverse(slots);
  const Sparse<float> token(tokens * kHidden), row(rows * kHidden), weights(slots),
      permuted(rows * kHidden), combined(tokens * kHidden), grad_row(rows * kHidden),
      grad_weights(slots);
  if (!(order && inverse && token && row && weights && permuted && combined && grad_row &&
        grad_weights))
    return {};
  std::fill_n(order.data() + first_row, kLastRows, -1);
  for (int64_t i = 0, n = 0; i < kLast * kSlots; ++i) {
    const bool live = i % 4 > 0;
    const int64_t slot = first_slot + i, r = live ? first_row + n++ * 7 % kLastRows : -1;
    inverse.data()[slot] = r;
    weights.data()[slot] = std::cos(static_cast<float>(i));
    if (live) order.data()[r] = slot;
  }
  for (int64_t i = 0; i < kLast * kHidden; ++i)
    token.data()[first * kHidden + i] = std::sin(static_cast<float>(i));
  for (int64_t i = 0; i < kLastRows * kHidden; ++i)
    row.data()[first_row * kHidden + i] = std::sin(static_cast<float>(2 * i));

  const DispatchPlan plan{tokens, kSlots, rows, kHidden, order.data(), inverse.data()};
  dispatch_cpu(Permute<float>{plan, token.data(), weights.data(), permuted.data()}, first, tokens);
  dispatch_cpu(ClearUnused<float>{plan, permuted.data()}, first_row, rows);
  dispatch_cpu(Combine<float>{plan, row.data(), weights.data(), combined.data()}, first, tokens);
  dispatch_cpu(CombineBackward<float>{plan, token.data(), row.data(), weights.data(),
                                      grad_row.data(), grad_weights.data()},
               first, tokens);
  dispatch_cpu(ClearUnused<float>{plan, grad_row.data()}, first_row, rows);

  std::vector<float> results;
  const auto append = [&](const Sparse<float>& values, int64_t from, int64_t count) {
    results.insert(results.end(), values.data() + from, values.data() + from + count);
  };
  append(permuted, first_row * kHidden, kLastRows * kHidden);
  append(combined, first * kHidden, kLast * kHidden);
  append(grad_row, first_row * kHidden, kLastRows * kHidden);
  append(grad_weights, first_slot, kLast * kSlots);
  return results;
}

TEST(TokenDispatchLarge, OffsetsBeyond32Bits) {
  constexpr int64_t kTokens = (int64_t{1} << 31) / kHidden + kLastRows;
  static_assert((kTokens - kLastRows) * kHidden >= int64_t{1} << 31);
  const auto large = results_of_the_last(kTokens);
  if (large.empty()) GTEST_SKIP() << "this machine maps no memory that it does not have";
  EXPECT_EQ(large, results_of_the_last(kLast));
}

}  // namespace
}  // namespace torch_routers
