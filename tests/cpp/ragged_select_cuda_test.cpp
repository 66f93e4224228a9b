// The CUDA kernel of ragged_select against the CPU kernel.
#include <gtest/gtest.h>

#include <limits>

#include "device_array.h"
#include "ragged_select_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

// Sums are rounded in another order there: what is compared must not depend on it.
template <class T> void expect_cuda_equals_cpu(const RaggedProblem<T>& problem) {
  SCOPED_TRACE(testing::Message() << problem.tokens << " tokens, " << problem.experts);
  const auto on_cpu = [](const RaggedProblem<T>& problem) {
    return problem.template run<HostArray>(
        [](const auto& p, int64_t tokens) { ragged_select_cpu(p, 0, tokens); });
  };
  const auto cpu = on_cpu(problem);
  for (const double factor : {1 - 1e-5, 1 + 1e-5}) {
    RaggedProblem<T> other = problem;
    other.top_p *= factor;
    for (double& threshold : other.thresholds) threshold *= factor;
    ASSERT_EQ(on_cpu(other), cpu) << "it is a matter of rounding";
  }
  const auto cuda = problem.template run<DeviceArray>(
      [](const auto& p, int64_t) { ragged_select_cuda(p, nullptr); });
  for (std::size_t i = 0; i < cpu.size(); ++i) ASSERT_EQ(cuda[i], cpu[i]) << "indices at " << i;
}

template <class T> void check_every_rule(int64_t tokens, int64_t experts) {
  RaggedProblem<T> problem(tokens, experts, experts < 40 ? experts : 40);
  problem.thresholds = {0.3, 0.9, 1.7, 2.4};
  problem.counts = {3, 1, 2, 40, 4};
  for (const RaggedRule rule :
       {RaggedRule::Entropy, RaggedRule::Confidence, RaggedRule::Positive}) {
    problem.rule = rule;
    problem.least = rule == RaggedRule::Positive ? 2 : 0;
    expect_cuda_equals_cpu(problem);
  }
  problem.rule = RaggedRule::TopP;
  for (const double top_p : {0.0, 0.61, 2.0})
    for (const Crossing crossing : {Crossing::Below, Crossing::Reaching, Crossing::Exceeding}) {
      problem.top_p = top_p;
      problem.crossing = crossing;
      expect_cuda_equals_cpu(problem);
    }
}

TEST(RaggedSelectCuda, EqualsTheCpuByEveryRule) {
  for (const int64_t tokens : {0, 1, 9})
    for (const int64_t experts : {1, 2, 6, 33, 70, 520}) {
      check_every_rule<float>(tokens, experts);
      check_every_rule<double>(tokens, experts);
    }
}

TEST(RaggedSelectCuda, EqualsTheCpuWhereRowsAreNotFinite) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  RaggedProblem<float> problem(6, 37, 8);
  const auto row = [&](int64_t t) { return problem.logits.begin() + 37 * t; };
  row(0)[35] = std::numeric_limits<float>::quiet_NaN();
  row(1)[4] = kInfinity;
  std::fill(row(2), row(3), -kInfinity);
  std::fill(row(3), row(4) - 1, -kInfinity);
  problem.sort();
  problem.thresholds = {0.3};
  problem.counts = {3, 5};
  for (const RaggedRule rule :
       {RaggedRule::TopP, RaggedRule::Entropy, RaggedRule::Confidence, RaggedRule::Positive}) {
    problem.rule = rule;
    expect_cuda_equals_cpu(problem);
  }
}

}  // namespace
}  // namespace torch_routers
