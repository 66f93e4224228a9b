// The CPU kernel of the entropy gate on every instruction set: what entropy_gate_kernel.h says, and
// the same bits everywhere. Memory is exact, for the sanitizers.
#include "entropy_gate/entropy_gate_kernel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "entropy_gate_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

class EntropyGateKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }

  template <class T> EntropyResults<T> run(const EntropyProblem<T>& problem) {
    return problem.template run<HostArray>([&](const auto& params, int64_t tokens) {
      for (int64_t t = 0; t < tokens; ++t)  // one by one: a range is what its tokens are
        TORCH_ROUTERS_PICK_ISA(GetParam(), entropy_gate(params, t, t + 1));
    });
  }

  // The weights of one token with these probabilities.
  std::vector<double> weights_of(const std::vector<double>& probabilities,
                                 const EntropyRule& rule) {
    EntropyProblem<double> problem(1, static_cast<int64_t>(probabilities.size()));
    problem.rule = rule;
    for (std::size_t e = 0; e < probabilities.size(); ++e)
      problem.logits[e] = std::log(probabilities[e]);
    return run(problem).weights;
  }
};

TEST_P(EntropyGateKernel, KeepsWhatTheRuleSays) {
  EntropyRule rule = entropy_rule();
  const auto kept = [&](const std::vector<double>& probabilities) {
    const auto weights = weights_of(probabilities, rule);
    return std::count_if(weights.begin(), weights.end(), [](double w) { return w != 0; });
  };
  EXPECT_EQ(kept({.5, .2, .1, .1, .06, .04}), 2);
  EXPECT_EQ(kept({.9, .04, .03, .01, .01, .01}), 2);
  EXPECT_EQ(kept({.2, .18, .17, .16, .15, .14}), 6);  // it cannot tell
  EXPECT_EQ(kept({.3, .25, .2, .1, .1, .05}), 6);
  rule.soft = false;
  rule.keep_top_k = 0;
  for (const auto& [crossing, count] :
       {std::pair{Crossing::Below, 1}, {Crossing::Reaching, 1}, {Crossing::Exceeding, 2}}) {
    rule.crossing = crossing;
    rule.top_p = weights_of({.5, .25, .25}, entropy_rule())[0];  // to the bit
    EXPECT_EQ(kept({.5, .25, .25}), count);
  }
}

TEST_P(EntropyGateKernel, KeepsTheLowerIndexOfEquals) {
  EntropyRule rule = entropy_rule();
  rule.soft = false;
  rule.top_p = 0;
  rule.keep_top_k = 3;
  const auto weights = weights_of(std::vector<double>(6, 1.0 / 6), rule);
  for (int e = 0; e < 6; ++e) EXPECT_EQ(weights[e] != 0, e < 3);
}

TEST_P(EntropyGateKernel, HasTheSlopesOfFiniteDifferences) {
  for (const double q : {0.5, 1.0, 1.001, 1.1, 2.0})
    for (const Entropy entropy : {Entropy::Tsallis, Entropy::Renyi}) {
      EntropyProblem<double> problem(1, 6);
      problem.rule.q = q;
      problem.rule.entropy = entropy;
      std::iota(problem.logits.begin(), problem.logits.end(), -2.0);
      const auto value = [&](const EntropyResults<double>& results) {
        return problem.grad_entropy[0] * results.entropy[0] +
               std::inner_product(results.weights.begin(), results.weights.end(),
                                  problem.grad_weights.begin(), 0.0);
      };
      const auto slopes = run(problem).grad_logits;
      for (int e = 0; e < 6; ++e) {
        constexpr double kStep = 1e-5;
        problem.logits[e] += kStep;
        const double above = value(run(problem));
        problem.logits[e] -= 2 * kStep;
        const double below = value(run(problem));
        problem.logits[e] += kStep;
        EXPECT_NEAR(slopes[e], (above - below) / (2 * kStep), 1e-8) << q << " " << e;
      }
    }
}

// One by one, and several at a time; experts: of tiles up to the largest, and of rows.
TEST_P(EntropyGateKernel, HasTheSameBitsAsTheDefault) {
  const auto compare = [&]<class T>(T) {
    for (const int64_t experts : {21, 512, 513})
      for (const bool renormalize : {false, true}) {
        EntropyProblem<T> problem(37, experts);
        problem.rule.renormalize = renormalize;
        const auto expected = problem.template run<HostArray>(
            [](const auto& p, int64_t tokens) { Default::entropy_gate(p, 0, tokens); });
        EXPECT_TRUE(run(problem) == expected) << experts;
        const auto at_once = problem.template run<HostArray>([&](const auto& p, int64_t tokens) {
          TORCH_ROUTERS_PICK_ISA(GetParam(), entropy_gate(p, 0, tokens));
        });
        EXPECT_TRUE(at_once == expected) << experts;
      }
  };
  compare(float{});
  compare(double{});
}

// An expert of logit -infinity takes no part in what is kept, but is one more than a tile has.
TEST_P(EntropyGateKernel, TilesAndRowsAgree) {
  for (const bool renormalize : {false, true}) {
    EntropyProblem<double> tile(37, 512), row(37, 513);
    tile.rule.soft = row.rule.soft = false;  // the entropy is divided by one of the experts
    tile.rule.renormalize = row.rule.renormalize = renormalize;
    tile.grad_entropy.assign(37, 0);
    row.grad_entropy.assign(37, 0);
    for (int64_t t = 0; t < 37; ++t) {
      std::copy_n(&tile.logits[t * 512], 512, &row.logits[t * 513]);
      std::copy_n(&tile.grad_weights[t * 512], 512, &row.grad_weights[t * 513]);
      row.logits[t * 513 + 512] = -std::numeric_limits<double>::infinity();
    }
    const auto of_tile = run(tile), of_row = run(row);
    for (int64_t t = 0; t < 37; ++t) {
      EXPECT_EQ(of_row.weights[t * 513 + 512], 0);
      EXPECT_EQ(of_row.grad_logits[t * 513 + 512], 0);
      for (int64_t e = 0; e < 512; ++e) {
        ASSERT_NEAR(of_tile.weights[t * 512 + e], of_row.weights[t * 513 + e], 1e-14);
        ASSERT_NEAR(of_tile.grad_logits[t * 512 + e], of_row.grad_logits[t * 513 + e], 1e-13);
      }
    }
  }
}

TEST_P(EntropyGateKernel, MaskedContentChangesNothing) {
  for (const int64_t experts : {21, 513}) {
    const EntropyProblem<float> problem(37, experts);
    EntropyProblem<float> other = problem;
    for (int64_t i = 0; i < 37 * experts; ++i)
      if (!problem.valid[i / experts])
        other.logits[i] = other.grad_weights[i] = std::numeric_limits<float>::quiet_NaN();
    const auto at_once = [&](const EntropyProblem<float>& problem) {
      return problem.run<HostArray>([&](const auto& p, int64_t tokens) {
        TORCH_ROUTERS_PICK_ISA(GetParam(), entropy_gate(p, 0, tokens));
      });
    };
    EXPECT_TRUE(at_once(problem) == at_once(other));
  }
}

TEST_P(EntropyGateKernel, MasksWhatIsNoNumber) {
  EntropyProblem<float> problem(3, 5);
  for (int i = 5; i < 10; ++i) problem.logits[i] = std::numeric_limits<float>::quiet_NaN();
  ASSERT_FALSE(problem.valid[1]);
  const auto results = run(problem);
  for (int i = 5; i < 10; ++i) {
    EXPECT_EQ(results.weights[i], 0);
    EXPECT_EQ(results.grad_logits[i], 0);
  }
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, EntropyGateKernel,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

}  // namespace
}  // namespace torch_routers
