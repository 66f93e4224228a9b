// The CPU kernels of the router losses on every instruction set: what router_losses_kernel.h says,
// and that nothing is read or written that should not be. Memory is exact, for the sanitizers.
#include "router_losses/router_losses_kernel.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace torch_routers {
namespace {

using std::int64_t;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Problem {
  std::vector<double> lse;
  std::vector<double> score_sums;  // [groups, experts]
  std::vector<int64_t> counts;
  std::vector<int64_t> group_tokens;
  double balance = 0.5, z = 0.25, importance = 2;
  bool switch_convention = false, per_group = false, unbiased = false;

  RouterLossesShape shape() const {
    const auto groups = static_cast<int64_t>(group_tokens.size());
    return {static_cast<int64_t>(lse.size()), groups,
            static_cast<int64_t>(score_sums.size()) / groups, per_group};
  }

  static Problem random(const std::vector<int64_t>& group_tokens, int64_t experts) {
    Problem q;
    std::mt19937 random(0);
    std::uniform_real_distribution<double> uniform(0, 1);
    q.group_tokens = group_tokens;
    for (const int64_t tokens : group_tokens) {
      for (int64_t t = 0; t < tokens; ++t) q.lse.push_back(3 * uniform(random) - 1);
      for (int64_t e = 0; e < experts; ++e) {
        q.score_sums.push_back(static_cast<double>(tokens) * uniform(random));
        q.counts.push_back(tokens ? static_cast<int64_t>(random() % (2 * tokens)) : 0);
      }
    }
    return q;
  }
};

class RouterLossesKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }

  template <class Params> void call(const Params& p, int64_t begin, int64_t end) {
    TORCH_ROUTERS_PICK_ISA(GetParam(), router_losses(p, begin, end));
  }

  RouterLosses<double> params(const Problem& q) {
    return {q.shape(),
            q.score_sums.data(),
            q.counts.data(),
            q.group_tokens.data(),
            q.lse.data(),
            nullptr,
            true,
            q.switch_convention,
            q.unbiased,
            q.balance,
            q.z,
            q.importance,
            nullptr,
            nullptr,
            nullptr,
            nullptr};
  }

  // The total, followed by the three losses.
  std::vector<double> losses(const Problem& q) {
    const RouterLossesShape shape = q.shape();
    std::vector<double> squares(shape.blocks(), 7), result(4, 7);
    call(LseSquares<double>{shape, q.lse.data(), squares.data()}, 0, shape.blocks());
    RouterLosses<double> p = params(q);
    p.squares = shape.blocks() > 1 ? squares.data() : nullptr;
    p.total = result.data();
    p.values = result.data() + 1;
    call(p, 0, 1);
    return result;
  }

  // Of lse, followed by that of the score sums; in ranges of `step`.
  std::vector<double> gradient(const Problem& q, double grad = 1, int64_t step = 1000000) {
    const RouterLossesShape shape = q.shape();
    std::vector<double> slopes(1 + shape.sets() * shape.experts, 7);
    RouterLosses<double> p = params(q);
    p.lse_slope = slopes.data();
    p.slopes = slopes.data() + 1;
    call(p, 0, 1);
    std::vector<double> of_lse(q.lse.size(), 7), of_sums(q.score_sums.size(), 7);
    const RouterLossesBackward<double> backward{
        shape,         &grad,         q.lse.data(), slopes.data(), slopes.data() + 1,
        of_lse.data(), of_sums.data()};
    const auto all = static_cast<int64_t>(of_lse.size() + of_sums.size());
    for (int64_t begin = 0; begin < all; begin += step)
      call(backward, begin, std::min(begin + step, all));
    of_lse.insert(of_lse.end(), of_sums.begin(), of_sums.end());
    return of_lse;
  }
};

TEST_P(RouterLossesKernel, AWorkedExample) {
  Problem q{{2.4076059644443806, 2.4076059644443806, 3.1698460, 2},
            {2.1055467, 1.2591754, .6352780},
            {3, 3, 2},
            {4}};
  EXPECT_NEAR(losses(q)[1], 1.0654427, 1e-7);
  EXPECT_NEAR(losses(q)[3], .2042051, 1e-7);
  q.unbiased = q.switch_convention = true;
  EXPECT_NEAR(losses(q)[1], 2.1308854, 1e-7);
  EXPECT_NEAR(losses(q)[3], .3063077, 1e-7);
  EXPECT_NEAR(losses(q)[2],
              (2 * 2.4076059644443806 * 2.4076059644443806 + 3.1698460 * 3.1698460 + 4) / 4, 1e-14);
}

TEST_P(RouterLossesKernel, BackwardIsTheFiniteDifference) {
  for (int bits = 0; bits < 8; ++bits) {
    Problem q = Problem::random({3, 0, 5}, 19);
    q.switch_convention = bits & 1;
    q.per_group = bits & 2;
    q.unbiased = bits & 4;
    const auto analytic = gradient(q, 1.5);
    EXPECT_EQ(analytic, gradient(q, 1.5, 1));
    EXPECT_EQ(analytic, gradient(q, 1.5, 5));
    for (std::size_t i = 0; i < analytic.size(); ++i) {
      double& x = i < q.lse.size() ? q.lse[i] : q.score_sums[i - q.lse.size()];
      const double step = 1e-5, at = x;
      x = at + step;
      const double above = losses(q)[0];
      x = at - step;
      const double below = losses(q)[0];
      x = at;
      EXPECT_NEAR(analytic[i], 1.5 * (above - below) / (2 * step), 1e-8) << bits << " " << i;
    }
  }
}

TEST_P(RouterLossesKernel, SquaresAreSummedInBlocks) {
  for (const int64_t tokens : {4095, 4096, 4097, 9000}) {
    const Problem q = Problem::random({tokens}, 3);
    double sum = 0;
    for (const double x : q.lse) sum += x * x;
    EXPECT_NEAR(losses(q)[2], sum / static_cast<double>(tokens), 1e-13);
  }
}

TEST_P(RouterLossesKernel, NoTokensAreNoLoss) {
  for (const bool per_group : {false, true}) {
    Problem q = Problem::random({0, 0}, 4);
    q.per_group = per_group;
    EXPECT_EQ(losses(q), std::vector<double>(4, 0));
    EXPECT_EQ(gradient(q), std::vector<double>(8, 0));
  }
}

TEST_P(RouterLossesKernel, OneExpertHasNoImportance) {
  for (const bool unbiased : {false, true}) {
    Problem q{{}, {3}, {3}, {3}};
    q.unbiased = unbiased;
    q.balance = 0;
    EXPECT_EQ(losses(q)[3], 0);
    EXPECT_EQ(gradient(q)[0], 0);
  }
}

TEST_P(RouterLossesKernel, AnLseOfMinusInfinityAddsNothing) {
  Problem q = Problem::random({3}, 4);
  q.lse = {2, -kInfinity, 4};
  EXPECT_EQ(losses(q)[2], 20.0 / 3);
  EXPECT_EQ(gradient(q)[1], 0);
  q.lse[1] = kInfinity;
  EXPECT_EQ(losses(q)[2], kInfinity);
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, RouterLossesKernel,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

}  // namespace
}  // namespace torch_routers
