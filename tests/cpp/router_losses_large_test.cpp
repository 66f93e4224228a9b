// Tokens beyond the first 2^31: the same losses and gradients as of those tokens alone.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "router_losses/router_losses_kernel.h"
#include "sparse.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int64_t kExperts = 3, kLast = 100;

// The total, the losses and the gradients, those of lse for the last tokens, in a block of their
// own; none if there is no room.
std::vector<float> results_of_the_last(int64_t tokens) {
  const RouterLossesShape shape{tokens, 1, kExperts, false};
  const Sparse<float> lse(tokens), grad_lse(tokens);
  const Sparse<double> squares(shape.blocks());
  if (!(lse && grad_lse && squares)) return {};
  const int64_t first = tokens - kLast;
  for (int64_t t = 0; t < kLast; ++t) lse.data()[first + t] = std::sin(static_cast<float>(t));
  const float score_sums[kExperts] = {1, 2, 4};
  const int64_t counts[kExperts] = {20, 30, 50}, group_tokens[] = {kLast};
  double slopes[1 + kExperts];
  float grad_score_sums[kExperts];
  std::vector<float> results(4);

  router_losses_cpu(LseSquares<float>{shape, lse.data(), squares.data()}, shape.blocks() - 1,
                    shape.blocks());
  RouterLosses<float> p{};
  static_cast<RouterLossesShape&>(p) = shape;
  p.score_sums = score_sums;
  p.counts = counts;
  p.group_tokens = group_tokens;
  p.lse = lse.data();
  p.squares = squares.data();
  p.importance = true;
  p.balance_weight = p.z_weight = p.importance_weight = 1;
  p.total = results.data();
  p.values = p.total + 1;
  router_losses_cpu(p, 0, 1);
  p.total = nullptr;
  p.lse_slope = slopes;
  p.slopes = slopes + 1;
  router_losses_cpu(p, 0, 1);
  router_losses_cpu(RouterLossesBackward<float>{shape, results.data(), lse.data(), slopes,
                                                slopes + 1, grad_lse.data(), grad_score_sums},
                    first, tokens + kExperts);
  results.insert(results.end(), grad_lse.data() + first, grad_lse.data() + tokens);
  results.insert(results.end(), grad_score_sums, grad_score_sums + kExperts);
  return results;
}

TEST(RouterLossesLarge, OffsetsBeyond32Bits) {
  constexpr int64_t kTokens = (int64_t{1} << 31) + RouterLossesShape::kBlock + kLast;
  const auto large = results_of_the_last(kTokens);
  if (large.empty()) GTEST_SKIP() << "this machine maps no memory that it does not have";
  EXPECT_EQ(large, results_of_the_last(kLast));
}

}  // namespace
}  // namespace torch_routers
