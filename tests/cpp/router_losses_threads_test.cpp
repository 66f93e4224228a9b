// Losses on several threads: for ThreadSanitizer, and to the same bits as on one.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "router_losses/router_losses_kernel.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

// The total, the losses and the gradients, one after the other.
std::vector<float> run(const RouterLossesShape& shape, int threads) {
  const int64_t size = shape.groups * shape.experts, tokens = shape.tokens;
  const std::vector<int64_t> group_tokens(shape.groups, tokens / shape.groups);
  std::vector<float> lse(tokens), score_sums(size), results(4 + tokens + size);
  std::vector<int64_t> counts(size);
  for (int64_t t = 0; t < tokens; ++t) lse[t] = std::sin(static_cast<float>(t));
  for (int64_t i = 0; i < size; ++i) {
    score_sums[i] = 1 + std::cos(static_cast<float>(i));
    counts[i] = i % 7;
  }
  std::vector<double> squares(shape.blocks()), slopes(1 + shape.sets() * shape.experts);
  const auto on_threads = [&](const auto& params, int64_t count) {
    run_on_threads(threads, count,
                   [&](int64_t begin, int64_t end) { router_losses_cpu(params, begin, end); });
  };
  on_threads(LseSquares<float>{shape, lse.data(), squares.data()}, shape.blocks());
  RouterLosses<float> p{};
  static_cast<RouterLossesShape&>(p) = shape;
  p.score_sums = score_sums.data();
  p.counts = counts.data();
  p.group_tokens = group_tokens.data();
  p.lse = lse.data();
  p.squares = squares.data();
  p.importance = true;
  p.balance_weight = p.z_weight = p.importance_weight = 1;
  p.total = results.data();
  p.values = p.total + 1;
  router_losses_cpu(p, 0, 1);
  const float* total = p.total;
  p.total = nullptr;
  p.lse_slope = slopes.data();
  p.slopes = slopes.data() + 1;
  router_losses_cpu(p, 0, 1);
  on_threads(RouterLossesBackward<float>{shape, total, lse.data(), p.lse_slope, p.slopes,
                                         results.data() + 4, results.data() + 4 + tokens},
             tokens + size);
  return results;
}

TEST(RouterLossesThreads, GiveTheSameBits) {
  for (const RouterLossesShape shape :
       {RouterLossesShape{30000, 3, 33, true}, RouterLossesShape{9000, 1, 300, false}}) {
    const auto expected = run(shape, 1);
    for (const int threads : {2, 3, 4, 8}) EXPECT_EQ(run(shape, threads), expected) << threads;
  }
}

}  // namespace
}  // namespace torch_routers
