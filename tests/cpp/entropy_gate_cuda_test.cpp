// The CUDA kernel of the entropy gate against the CPU kernel.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "device_array.h"
#include "entropy_gate_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

template <class T>
void expect_close(const char* what, const std::vector<T>& actual, const std::vector<T>& expected,
                  int64_t experts) {
  ASSERT_EQ(actual.size(), expected.size());
  const double tolerance = (64 + static_cast<double>(experts)) * std::numeric_limits<T>::epsilon();
  for (std::size_t i = 0; i < actual.size(); ++i)
    if (!(std::abs(actual[i] - expected[i]) <= tolerance * (1 + std::abs(expected[i])))) {
      ADD_FAILURE() << what << " at " << i << ": " << actual[i] << ", on the CPU " << expected[i];
      return;
    }
}

template <class T> void expect_cuda_equals_cpu(const EntropyProblem<T>& problem) {
  SCOPED_TRACE(testing::Message() << problem.tokens << " tokens, " << problem.experts);
  const auto cpu = problem.template run<HostArray>(
      [](const auto& p, int64_t tokens) { entropy_gate_cpu(p, 0, tokens); });
  const auto cuda = problem.template run<DeviceArray>(
      [](const auto& p, int64_t) { entropy_gate_cuda(p, nullptr); });
  for (std::size_t i = 0; i < cpu.weights.size(); ++i)
    ASSERT_EQ(cuda.weights[i] != 0, cpu.weights[i] != 0) << "kept at " << i;
  expect_close("weights", cuda.weights, cpu.weights, problem.experts);
  expect_close("entropy", cuda.entropy, cpu.entropy, problem.experts);
  expect_close("grad_logits", cuda.grad_logits, cpu.grad_logits, problem.experts);
}

TEST(EntropyGateCuda, EqualsTheCpu) {
  for (const int64_t tokens : {0, 1, 9})
    for (const int64_t experts : {1, 2, 6, 33, 70}) {
      expect_cuda_equals_cpu(EntropyProblem<float>(tokens, experts));
      expect_cuda_equals_cpu(EntropyProblem<double>(tokens, experts));
    }
}

TEST(EntropyGateCuda, EqualsTheCpuByEveryRule) {
  EntropyProblem<float> problem(12, 8);
  for (const Entropy entropy : {Entropy::Tsallis, Entropy::Renyi})
    for (const Crossing crossing : {Crossing::Below, Crossing::Reaching, Crossing::Exceeding})
      for (const double q : {0.5, 1.0, 1.001, 2.0}) {
        problem.rule.entropy = entropy;
        problem.rule.crossing = crossing;
        problem.rule.q = q;
        problem.rule.soft = q == 0.5;
        problem.rule.renormalize = q == 2;
        expect_cuda_equals_cpu(problem);
      }
}

}  // namespace
}  // namespace torch_routers
