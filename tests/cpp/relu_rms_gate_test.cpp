// The CPU kernels of the ReLU-RMSNorm gate on every instruction set: what relu_rms_gate_kernel.h
// says. Memory is exact, for the sanitizers.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "relu_rms_gate_run.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr ReluNorm kNorms[] = {ReluNorm::Rms, ReluNorm::Centered, ReluNorm::Simple};

class ReluRmsGateKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }
  template <class S> ReluResults<S> results(const ReluProblem<S>& q, int64_t step = 1000000) {
    return run_relu<HostArray>(q, [&](const auto& p, int64_t count) {
      for (int64_t begin = 0; begin < count; begin += step) {
        const int64_t end = begin + step < count ? begin + step : count;
        TORCH_ROUTERS_PICK_ISA(GetParam(), relu_rms_gate(p, begin, end));
      }
    });
  }
};

TEST_P(ReluRmsGateKernel, AWorkedExample) {
  ReluProblem<double> q(1, 4, ReluNorm::Rms);
  q.logits = {.6, -.2, .3, 0};
  q.gain = {1, 1, .5, -1};
  q.grad_weights = {.5, 1, -1, 2};
  const auto r = results(q);
  const double weights[] = {1.7887749, 0, .4471937, 0}, logits[] = {.8944404, 0, -1.7887484, 0},
               gain[] = {.8943874, 0, -.8943874, 0};
  EXPECT_NEAR(r.inverse_rms[0], 2.9812915, 1e-7);
  for (int e = 0; e < 4; ++e) {
    EXPECT_NEAR(r.weights[e], weights[e], 1e-7);
    EXPECT_NEAR(r.grad_logits[e], logits[e], 1e-7);
    EXPECT_NEAR(r.grad_gain[e], gain[e], 1e-7);
  }
  EXPECT_EQ(r.counts, (std::vector<int64_t>{1, 0, 1, 0}));
}

TEST_P(ReluRmsGateKernel, BackwardIsTheFiniteDifference) {
  for (const ReluNorm norm : kNorms) {
    ReluProblem<double> q(70, 19, norm, true);
    const auto exact = results(q);
    const auto value = [&] {
      const auto r = results(q);
      double sum = 0;
      for (std::size_t i = 0; i < r.weights.size(); ++i) sum += r.weights[i] * q.grad_weights[i];
      return sum;
    };
    const auto slope = [&](double& x) {
      const double at = x, step = 1e-6;
      x = at + step;
      const double above = value();
      x = at - step;
      const double below = value();
      x = at;
      return (above - below) / (2 * step);
    };
    for (std::size_t i = 0; i < q.logits.size(); i += 13)
      if (std::abs(q.logits[i]) > 1e-3) {
        EXPECT_NEAR(exact.grad_logits[i], slope(q.logits[i]), 1e-6);
      }
    for (int64_t e = 0; e < q.experts; ++e) EXPECT_NEAR(exact.grad_gain[e], slope(q.gain[e]), 1e-6);
  }
}

TEST_P(ReluRmsGateKernel, ADeadRowIsZeroAndHasNoGradient) {
  for (const ReluNorm norm : kNorms) {
    ReluProblem<float> q(1, 5, norm);
    q.logits = {-1, 0, -0.0f, -std::numeric_limits<float>::infinity(), -1e-30f};
    const auto r = results(q);
    EXPECT_EQ(r.weights, std::vector<float>(5, 0));
    EXPECT_EQ(r.grad_logits, std::vector<float>(5, 0));
    EXPECT_EQ(r.counts, std::vector<int64_t>(5, 0));
  }
}

TEST_P(ReluRmsGateKernel, MaskedContentChangesNothing) {
  for (const ReluNorm norm : kNorms)
    for (const int64_t experts : {33, 65}) {  // tiles, and rows
      ReluProblem<float> q(130, experts, norm, true), other = q;
      for (int64_t i = 0; i < q.tokens * q.experts; ++i)
        if (!q.valid[i / q.experts])
          other.logits[i] = other.grad_weights[i] = std::numeric_limits<float>::quiet_NaN();
      const auto a = results(q), b = results(other);
      EXPECT_EQ(a.weights, b.weights);
      EXPECT_EQ(a.counts, b.counts);
      EXPECT_EQ(a.grad_logits, b.grad_logits);
      EXPECT_EQ(a.grad_gain, b.grad_gain);
    }
}

TEST_P(ReluRmsGateKernel, RangesGiveTheSameBits) {
  for (const ReluNorm norm : kNorms) {
    const ReluProblem<float> q(200, 37, norm, true);
    const auto a = results(q), b = results(q, 1);
    EXPECT_EQ(a.weights, b.weights);
    EXPECT_EQ(a.grad_logits, b.grad_logits);
    EXPECT_EQ(a.grad_gain, b.grad_gain);
  }
}

TEST_P(ReluRmsGateKernel, ATokenAloneIsWhatItIsAmongOthers) {
  const auto check = [&]<class T>(T) {
    for (const ReluNorm norm : kNorms)
      for (const int64_t experts : {1, 37, 64, 65}) {
        const ReluProblem<T> q(37, experts, norm);
        const auto all = results(q);
        for (int64_t t = 0; t < q.tokens; ++t) {
          ReluProblem<T> alone(1, experts, norm);
          const auto row = [&](const std::vector<T>& values) {
            const auto first = values.begin() + t * experts;
            return std::vector<T>(first, first + experts);
          };
          alone.logits = row(q.logits);
          alone.gain = q.gain;
          alone.grad_weights = row(q.grad_weights);
          const auto one = results(alone);
          EXPECT_EQ(one.weights, row(all.weights));
          EXPECT_EQ(one.inverse_rms[0], all.inverse_rms[t]);
          EXPECT_EQ(one.grad_logits, row(all.grad_logits));
        }
      }
  };
  check(float{});
  check(double{});
}

TEST_P(ReluRmsGateKernel, HasTheSameBitsAsTheDefault) {
  for (const ReluNorm norm : kNorms)
    for (const int64_t experts : {1, 37, 64, 65}) {
      const ReluProblem<float> q(70, experts, norm, true);
      const auto expected = run_relu<HostArray>(
          q, [](const auto& p, int64_t count) { Default::relu_rms_gate(p, 0, count); });
      const auto r = results(q);
      EXPECT_EQ(r.weights, expected.weights);
      EXPECT_EQ(r.counts, expected.counts);
      EXPECT_EQ(r.grad_logits, expected.grad_logits);
      EXPECT_EQ(r.grad_gain, expected.grad_gain);
    }
}

// Simple knows nothing of other experts: one more, which is not active, makes rows of tiles.
TEST_P(ReluRmsGateKernel, TilesAndRowsAgree) {
  ReluProblem<double> tile(70, 64, ReluNorm::Simple, true), row(70, 65, ReluNorm::Simple);
  row.valid = tile.valid;
  std::copy_n(tile.gain.begin(), 64, row.gain.begin());
  for (int64_t t = 0; t < 70; ++t) {
    std::copy_n(&tile.logits[t * 64], 64, &row.logits[t * 65]);
    std::copy_n(&tile.grad_weights[t * 64], 64, &row.grad_weights[t * 65]);
    row.logits[t * 65 + 64] = 0;
  }
  const auto of_tile = results(tile), of_row = results(row);
  for (int64_t e = 0; e < 64; ++e) {
    EXPECT_EQ(of_tile.counts[e], of_row.counts[e]);
    EXPECT_NEAR(of_tile.grad_gain[e], of_row.grad_gain[e], 1e-12);
    for (int64_t t = 0; t < 70; ++t) {
      ASSERT_EQ(of_tile.weights[t * 64 + e], of_row.weights[t * 65 + e]);
      ASSERT_EQ(of_tile.grad_logits[t * 64 + e], of_row.grad_logits[t * 65 + e]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, ReluRmsGateKernel,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

}  // namespace
}  // namespace torch_routers
