#include <gtest/gtest.h>

#include "relu_rms_gate_run.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

TEST(ReluRmsGateThreads, GiveTheSameBits) {
  const ReluProblem<float> q(5000, 33, ReluNorm::Rms, true);
  const auto on = [&](int threads) {
    return run_relu<HostArray>(q, [&](const auto& p, int64_t count) {
      run_on_threads(threads, count,
                     [&](int64_t begin, int64_t end) { relu_rms_gate_cpu(p, begin, end); });
    });
  };
  const auto expected = on(1);
  for (const int threads : {2, 3, 8}) {
    const auto actual = on(threads);
    EXPECT_EQ(actual.weights, expected.weights);
    EXPECT_EQ(actual.counts, expected.counts);
    EXPECT_EQ(actual.grad_logits, expected.grad_logits);
    EXPECT_EQ(actual.grad_gain, expected.grad_gain);
  }
}

}  // namespace
}  // namespace torch_routers
