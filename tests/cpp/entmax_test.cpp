// The CPU kernels of entmax on every instruction set: what entmax_kernel.h says, and that nothing is
// read or written that should not be. Memory is exact, for the sanitizers.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "entmax_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
const double kAlphas[] = {1, 1.00005, 1.001, 1.25, 1.5, 1.75, 2, 2.5, 3, 10};

class EntmaxKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }

  // In ranges of `step` blocks.
  template <class S>
  EntmaxResults<Compute<S>> run(const EntmaxProblem<S>& q, int64_t step = 1000000) {
    return run_on(GetParam(), q, step);
  }
  template <class S>
  static EntmaxResults<Compute<S>> run_on(Isa isa, const EntmaxProblem<S>& q,
                                          int64_t step = 1000000) {
    return run_entmax<HostArray>(q, [&](const auto& p, int64_t count) {
      for (int64_t begin = 0; begin < count; begin += step)
        TORCH_ROUTERS_PICK_ISA(isa, entmax(p, begin, std::min(begin + step, count)));
    });
  }

  static double loss(const EntmaxProblem<double>& q, const std::vector<double>& weights) {
    double sum = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) sum += weights[i] * q.grad_weights[i];
    return sum;
  }
};

TEST_P(EntmaxKernel, WorkedExamples) {
  EntmaxProblem<double> q{{1, 3}, 2, false, {2, 1.5, 0}, {}, {1, 0, 0}};
  EXPECT_EQ(run(q).weights, (std::vector<double>{0.75, 0.25, 0}));
  EXPECT_EQ(run(q).counts, (std::vector<int64_t>{1, 1, 0}));
  q = {{1, 2}, 1.5, false, {2, 0}, {}, {1, 0}};  // the last logit is just not in the support
  EXPECT_EQ(run(q).weights, (std::vector<double>{1, 0}));
  q = {{1, 2}, 1.5, false, {1, 0}, {}, {1, 0}};  // sqrt p_0 - sqrt p_1 = 1 / 2
  const double root = (1 + std::sqrt(7.0)) / 4;
  EXPECT_NEAR(run(q).weights[0], root * root, 1e-15);
}

// The conditions that define the solution: p_i^(alpha - 1) - (alpha - 1) x_i is the same for all
// that are active, and no smaller for the others.
TEST_P(EntmaxKernel, SolvesTheProblem) {
  for (const double alpha : kAlphas)
    for (const int64_t experts : {1, 2, 3, 8, 17, 33, 70, 256, 257})
      for (const double size : {0.01, 1.0, 5.0}) {
        if (alpha < 1.001 || alpha > 3) continue;  // 10: d = 1e-17 is a weight of 0.01
        const auto q = EntmaxProblem<double>::random(19, experts, alpha, size);
        const auto weights = run(q).weights;
        for (int64_t t = 0; t < 19; ++t) {
          double sum = 0, high = -kInfinity, low = kInfinity, outside = kInfinity;
          for (int64_t e = 0; e < experts; ++e) {
            const double p = weights[t * experts + e];
            const double at = std::pow(p, alpha - 1) - (alpha - 1) * q.logits[t * experts + e];
            sum += p;
            if (p == 0) outside = std::min(outside, at);
            if (p > 0) high = std::max(high, at), low = std::min(low, at);
          }
          EXPECT_NEAR(sum, 1, 1e-14);
          EXPECT_LE(high - low, 1e-12) << alpha << " " << experts << " " << size;
          EXPECT_GE(outside, low - 1e-12) << alpha << " " << experts << " " << size;
        }
      }
}

TEST_P(EntmaxKernel, BackwardIsTheFiniteDifference) {
  for (const double alpha : kAlphas) {
    if (alpha > 1 && alpha < 1.0005) continue;  // its slope is that at 1, its value constant
    auto q = EntmaxProblem<double>::random(5, 6, alpha);
    q.is_learned = true;
    const auto results = run(q);
    const double step = 1e-6;
    for (std::size_t i = 0; i < q.logits.size(); ++i) {
      auto up = q, down = q;
      up.logits[i] += step;
      down.logits[i] -= step;
      const double slope = (loss(q, run(up).weights) - loss(q, run(down).weights)) / (2 * step);
      EXPECT_NEAR(results.grad_logits[i], slope, 1e-5 * (1 + std::abs(slope))) << alpha;
    }
    if (alpha == 1) continue;
    auto up = q, down = q;
    up.alpha += step;
    down.alpha -= step;
    const double slope = (loss(q, run(up).weights) - loss(q, run(down).weights)) / (2 * step);
    EXPECT_NEAR(results.grad_alpha[0], slope, 1e-5 * (1 + std::abs(slope))) << alpha;
  }
}

TEST_P(EntmaxKernel, TheSlopeInAlphaIsContinuousAtOne) {
  auto at = EntmaxProblem<double>::random(40, 9, 1), above = at;
  above.alpha = 1.00011;
  at.is_learned = above.is_learned = true;
  EXPECT_NEAR(run(at).grad_alpha[0], run(above).grad_alpha[0], 0.01);
}

TEST_P(EntmaxKernel, LargerAlphaHasNoMoreExperts) {
  std::vector<int64_t> most(17, 17);
  for (const double alpha : kAlphas) {
    const auto weights = run(EntmaxProblem<double>::random(17, 17, alpha)).weights;
    for (int64_t t = 0; t < 17; ++t) {
      int64_t active = 0;
      for (int64_t e = 0; e < 17; ++e) active += weights[t * 17 + e] != 0;
      EXPECT_LE(active, most[t]);
      most[t] = active;
    }
  }
}

TEST_P(EntmaxKernel, SpecialRows) {
  for (const double alpha : kAlphas)
    for (const int64_t experts : {5, 300}) {
      auto q = EntmaxProblem<double>::random(8, experts, alpha);
      const auto row = [&](int64_t t) { return q.logits.begin() + t * experts; };
      std::fill(row(0), row(1), -kInfinity);
      row(1)[3] = kNaN;
      row(2)[4] = kInfinity;
      row(3)[2] = -kInfinity;
      std::fill(row(4), row(5), -7);
      std::fill(row(5), row(6), kNaN);
      q.valid.assign(8, 1);
      q.valid[5] = q.valid[6] = 0;
      row(7)[0] = 1e300;
      const auto results = run(q);
      const auto& w = results.weights;
      std::vector<int64_t> counts(experts);
      for (int64_t e = 0; e < experts; ++e) {
        EXPECT_EQ(w[e], 0);
        EXPECT_EQ(results.grad_logits[e], 0);
        EXPECT_TRUE(std::isnan(w[experts + e]) && std::isnan(w[2 * experts + e]));
        EXPECT_NEAR(w[4 * experts + e], 1.0 / static_cast<double>(experts), 1e-15);
        EXPECT_EQ(w[5 * experts + e], 0);
        EXPECT_EQ(w[6 * experts + e], 0);
        EXPECT_EQ(results.grad_logits[5 * experts + e], 0);
        EXPECT_EQ(w[7 * experts + e], e == 0 ? 1 : 0);
        for (int64_t t = 0; t < 8; ++t) counts[e] += w[t * experts + e] != 0;
      }
      EXPECT_EQ(w[3 * experts + 2], 0);
      EXPECT_EQ(results.counts, counts);
    }
}

TEST_P(EntmaxKernel, AlphaThatIsNone) {
  for (const double alpha : {0.5, -1.0, kNaN, kInfinity}) {
    auto q = EntmaxProblem<float>::random(3, 4, alpha);
    q.is_learned = true;
    q.valid = {1, 0, 1};
    const auto results = run(q);
    for (int64_t i = 0; i < 12; ++i)
      EXPECT_TRUE(i / 4 == 1 ? results.weights[i] == 0 : std::isnan(results.weights[i]));
    EXPECT_EQ(results.counts, (std::vector<int64_t>{2, 2, 2, 2}));
  }
}

TEST_P(EntmaxKernel, TheSameBitsInEveryRangeAndOnEveryInstructionSet) {
  const auto check = [&]<class S>(S) {
    for (const double alpha : kAlphas)
      for (const int64_t experts : {1, 5, 31, 33, 70, 257}) {
        auto q = EntmaxProblem<S>::random(70, experts, alpha, 2);
        q.is_learned = experts % 2;
        const auto expected = run_on(Isa::Default, q);
        EXPECT_EQ(run(q), expected) << alpha << " " << experts;
        EXPECT_EQ(run(q, 1), expected) << alpha << " " << experts;
      }
  };
  check(float{});
  check(double{});
  check(BFloat16{});
  check(Float16{});
}

TEST_P(EntmaxKernel, ATokenAloneIsWhatItIsAmongOthers) {
  for (const double alpha : kAlphas)
    for (const int64_t experts : {1, 31, 256, 257}) {
      const auto q = EntmaxProblem<float>::random(37, experts, alpha, 2);
      const auto all = run(q);
      for (int64_t t = 0; t < 37; t += 3) {
        const auto row = [&](const std::vector<float>& values) {
          const auto first = values.begin() + t * experts;
          return std::vector<float>(first, first + experts);
        };
        auto alone = EntmaxProblem<float>::random(1, experts, alpha);
        alone.logits = row(q.logits);
        alone.grad_weights = row(q.grad_weights);
        const auto one = run(alone);
        EXPECT_EQ(one.weights, row(all.weights)) << alpha << " " << experts;
        EXPECT_EQ(one.grad_logits, row(all.grad_logits)) << alpha << " " << experts;
      }
    }
}

// An expert of logit -infinity gets nothing, but is one more than a tile has.
TEST_P(EntmaxKernel, TilesAndRowsAgree) {
  for (const double alpha : kAlphas) {
    const auto tile = EntmaxProblem<double>::random(37, 256, alpha, 2);
    auto row = EntmaxProblem<double>::random(37, 257, alpha);
    for (int64_t t = 0; t < 37; ++t) {
      std::copy_n(&tile.logits[t * 256], 256, &row.logits[t * 257]);
      row.logits[t * 257 + 256] = -kInfinity;
    }
    const auto of_tile = run(tile).weights, of_row = run(row).weights;
    for (int64_t t = 0; t < 37; ++t) {
      EXPECT_EQ(of_row[t * 257 + 256], 0);
      for (int64_t e = 0; e < 256; ++e)
        ASSERT_NEAR(of_tile[t * 256 + e], of_row[t * 257 + e], 1e-13) << alpha;
    }
  }
}

TEST_P(EntmaxKernel, MaskedContentChangesNothing) {
  for (const double alpha : kAlphas)
    for (const int64_t experts : {31, 257}) {
      auto q = EntmaxProblem<float>::random(37, experts, alpha);
      for (int64_t t = 0; t < 37; ++t) q.valid.push_back(t % 3 != 1);
      auto other = q;
      for (int64_t i = 0; i < 37 * experts; ++i)
        if (!q.valid[i / experts]) other.logits[i] = std::numeric_limits<float>::quiet_NaN();
      EXPECT_EQ(run(other), run(q)) << alpha << " " << experts;
    }
}

TEST_P(EntmaxKernel, NoTokens) {
  auto q = EntmaxProblem<float>::random(0, 4, 1.5);
  q.is_learned = true;
  const auto results = run(q);
  EXPECT_EQ(results.counts, (std::vector<int64_t>(4)));
  EXPECT_EQ(results.grad_alpha, (std::vector<float>{0}));
}

INSTANTIATE_TEST_SUITE_P(Isas, EntmaxKernel, testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return std::string(name(info.param)); });

}  // namespace
}  // namespace torch_routers
