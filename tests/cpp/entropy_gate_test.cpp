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

TEST_P(EntropyGateKernel, HasTheSameBitsAsTheDefault) {
  const auto compare = [&]<class T>(T) {
    const EntropyProblem<T> problem(9, 21);
    const auto expected = problem.template run<HostArray>(
        [](const auto& p, int64_t tokens) { Default::entropy_gate(p, 0, tokens); });
    EXPECT_TRUE(run(problem) == expected);
  };
  compare(float{});
  compare(double{});
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
