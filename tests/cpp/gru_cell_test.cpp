// The CPU kernel of the recurrent cell on every instruction set: what gru_cell_kernel.h says, the
// same bits everywhere, and that nothing is read or written that should not be. Memory is exact,
// for the sanitizers.
#include "gru_cell/gru_cell_kernel.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "gru_cell/gru_cell_math.h"
#include "gru_cell_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

class GruCellKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }

  template <class T> GruResults<T> run(const GruProblem<T>& problem) {
    return problem.template run<HostArray>([&](const auto& params, int64_t tokens) {
      for (int64_t t = 0; t < tokens; ++t)  // one by one: a range is what its tokens are
        TORCH_ROUTERS_PICK_ISA(GetParam(), gru_cell(params, t, t + 1));
    });
  }
};

TEST_P(GruCellKernel, EqualsTheFormula) {
  for (const int64_t size : {1, 3, 8, 17, 64, 130}) {
    const GruProblem<double> problem(5, size);
    const GruResults<double> results = run(problem);
    for (int64_t t = 0; t < 5; ++t)
      for (int64_t i = 0; i < size; ++i) {
        const auto gate = [&](const std::vector<double>& gates, int64_t which) {
          return gates[(t * 3 + which) * size + i];
        };
        const auto& a = problem.input_gates;
        const auto& b = problem.hidden_gates;
        const double h = problem.state[t * size + i], grad = problem.grad_next[t * size + i];
        const double reset = 1 / (1 + std::exp(-gate(a, 0) - gate(b, 0)));
        const double update = 1 / (1 + std::exp(-gate(a, 1) - gate(b, 1)));
        const double candidate = std::tanh(gate(a, 2) + reset * gate(b, 2));
        const bool valid = problem.valid[t];
        EXPECT_NEAR(results.next[t * size + i], valid ? (1 - update) * candidate + update * h : h,
                    1e-15);
        const double of_candidate = valid ? grad * (1 - update) * (1 - candidate * candidate) : 0;
        const double of_update = valid ? grad * (h - candidate) * update * (1 - update) : 0;
        const double of_reset = of_candidate * gate(b, 2) * reset * (1 - reset);
        EXPECT_NEAR(gate(results.grad_input_gates, 0), of_reset, 1e-14);
        EXPECT_NEAR(gate(results.grad_hidden_gates, 0), of_reset, 1e-14);
        EXPECT_NEAR(gate(results.grad_input_gates, 1), of_update, 1e-14);
        EXPECT_NEAR(gate(results.grad_hidden_gates, 1), of_update, 1e-14);
        EXPECT_NEAR(gate(results.grad_input_gates, 2), of_candidate, 1e-14);
        EXPECT_NEAR(gate(results.grad_hidden_gates, 2), of_candidate * reset, 1e-14);
        EXPECT_NEAR(results.grad_state[t * size + i], valid ? grad * update : grad, 1e-14);
      }
  }
}

TEST_P(GruCellKernel, HasTheSameBitsAsTheDefault) {
  const auto compare = [&]<class T>(T) {
    const GruProblem<T> problem(7, 45);
    const GruResults<T> expected = problem.template run<HostArray>(
        [](const auto& p, int64_t tokens) { Default::gru_cell(p, 0, tokens); });
    EXPECT_TRUE(run(problem) == expected);
  };
  compare(float{});
  compare(double{});
}

TEST_P(GruCellKernel, MasksWhatIsNoNumber) {
  GruProblem<float> problem(3, 9);
  for (int64_t i = 27; i < 54; ++i)  // of the second token, which is masked
    problem.input_gates[i] = problem.hidden_gates[i] = std::numeric_limits<float>::quiet_NaN();
  ASSERT_FALSE(problem.valid[1]);
  for (const float x : run(problem).grad_input_gates) EXPECT_TRUE(std::isfinite(x));
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, GruCellKernel,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

// In units in the last place of the result.
template <class T> double tanh_error(T x) {
  const long double exact = std::tanh(static_cast<long double>(x));
  const T nearest = static_cast<T>(exact < 0 ? -exact : exact);
  const T unit = std::nextafter(nearest, T{2}) - nearest;
  return static_cast<double>(std::abs(static_cast<long double>(own_tanh(x)) - exact) / unit);
}

TEST(OwnTanh, IsAccurateEverywhere) {
  for (double x = 1e-30; x < 1e30; x *= 1.0007)
    for (const double sign : {1.0, -1.0}) {
      ASSERT_LE(tanh_error(sign * x), 4) << x;
      ASSERT_LE(tanh_error(static_cast<float>(sign * x)), 4) << x;
    }
  EXPECT_EQ(own_tanh(0.0f), 0.0f);
  EXPECT_EQ(own_tanh(std::numeric_limits<float>::infinity()), 1.0f);
  EXPECT_EQ(own_tanh(-std::numeric_limits<double>::infinity()), -1.0);
  EXPECT_TRUE(std::isnan(own_tanh(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace
}  // namespace torch_routers
