// The CUDA kernels of the ReLU-RMSNorm gate against the CPU kernels.
#include <gtest/gtest.h>

#include <limits>

#include "device_array.h"
#include "relu_rms_gate_run.h"

namespace torch_routers {
namespace {

using std::int64_t;

template <class C, class T>
void expect_close(const char* what, const std::vector<T>& actual, const std::vector<T>& expected,
                  double epsilon) {
  ASSERT_EQ(actual.size(), expected.size());
  double largest = std::numeric_limits<float>::min();
  for (const T x : expected) largest = std::max<double>(largest, std::abs(load(x)));
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double x = load(actual[i]), y = load(expected[i]);
    if (!(std::abs(x - y) <= epsilon * largest) && !(x != x && y != y)) {
      ADD_FAILURE() << what << " at " << i << ": " << x << ", on the CPU " << y;
      return;
    }
  }
}

template <class S> void compare(const ReluProblem<S>& q) {
  using C = Compute<S>;
  const auto cpu =
      run_relu<HostArray>(q, [](const auto& p, int64_t count) { relu_rms_gate_cpu(p, 0, count); });
  const auto cuda =
      run_relu<DeviceArray>(q, [](const auto& p, int64_t) { relu_rms_gate_cuda(p, nullptr); });
  const double epsilon = 64 * std::numeric_limits<C>::epsilon();
  EXPECT_EQ(cuda.counts, cpu.counts);
  expect_close<C>("weights", cuda.weights, cpu.weights, epsilon);
  expect_close<C>("inverse_rms", cuda.inverse_rms, cpu.inverse_rms, epsilon);
  expect_close<C>("grad_logits", cuda.grad_logits, cpu.grad_logits,
                  sizeof(S) == 2 ? 0.01 : epsilon);
  expect_close<C>("grad_gain", cuda.grad_gain, cpu.grad_gain, epsilon);
}

template <class S> class ReluRmsGateCuda : public testing::Test {};
using Types = testing::Types<float, double, BFloat16, Float16>;
TYPED_TEST_SUITE(ReluRmsGateCuda, Types);

TYPED_TEST(ReluRmsGateCuda, EqualsTheCpu) {
  for (const ReluNorm norm : {ReluNorm::Rms, ReluNorm::Centered, ReluNorm::Simple})
    for (const bool masked : {false, true})
      for (const int64_t experts : {1, 7, 32, 33, 300})
        for (const int64_t tokens : {0, 1, 64, 70}) {
          SCOPED_TRACE(testing::Message()
                       << static_cast<int>(norm) << masked << " " << tokens << " x " << experts);
          compare(ReluProblem<TypeParam>(tokens, experts, norm, masked));
        }
}

TYPED_TEST(ReluRmsGateCuda, NotANumber) {
  using C = Compute<TypeParam>;
  ReluProblem<TypeParam> q(5, 40, ReluNorm::Rms);
  store(&q.logits[3], std::numeric_limits<C>::quiet_NaN());
  store(&q.logits[50], std::numeric_limits<C>::infinity());
  store(&q.logits[90], -std::numeric_limits<C>::infinity());
  compare(q);
}

}  // namespace
}  // namespace torch_routers
