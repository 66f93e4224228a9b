// The CUDA kernels of entmax against the CPU kernels.
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "device_array.h"
#include "entmax_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

struct Case {
  std::string name;
  int64_t tokens, experts;
};
std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

template <class C>
void expect_close(const char* what, const std::vector<C>& actual, const std::vector<C>& expected,
                  double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  double largest = 1;
  for (const C x : expected)
    if (std::isfinite(x)) largest = std::max<double>(largest, std::abs(x));
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(actual[i]) && std::isnan(expected[i])) continue;
    if (!(std::abs(actual[i] - expected[i]) <= tolerance * largest)) {
      ADD_FAILURE() << what << " at " << i << ": " << actual[i] << ", on the CPU " << expected[i];
      return;
    }
  }
}

template <class S> void expect_cuda_equals_cpu(const EntmaxProblem<S>& q) {
  SCOPED_TRACE(testing::Message() << q.alpha << (q.is_learned ? " learned" : ""));
  const auto cpu =
      run_entmax<HostArray>(q, [](const auto& p, int64_t count) { entmax_cpu(p, 0, count); });
  const auto cuda =
      run_entmax<DeviceArray>(q, [](const auto& p, int64_t) { entmax_cuda(p, nullptr); });
  const double epsilon = std::numeric_limits<Compute<S>>::epsilon();
  expect_close("weights", cuda.weights, cpu.weights, 64 * epsilon);
  expect_close("grad_logits", cuda.grad_logits, cpu.grad_logits, 1024 * epsilon);
  expect_close("grad_alpha", cuda.grad_alpha, cpu.grad_alpha, 1024 * epsilon);
  EXPECT_EQ(cuda.counts, cpu.counts);
}

class EntmaxCuda : public testing::TestWithParam<Case> {
 protected:
  template <class S> void compare() {
    for (const double alpha : {1.0, 1.3, 1.5, 2.0, 2.5})
      for (const bool is_learned : {false, true}) {
        auto q = EntmaxProblem<S>::random(GetParam().tokens, GetParam().experts, alpha);
        q.is_learned = is_learned;
        expect_cuda_equals_cpu(q);
      }
  }
};
TEST_P(EntmaxCuda, Float) { compare<float>(); }
TEST_P(EntmaxCuda, Double) { compare<double>(); }
TEST_P(EntmaxCuda, BFloat16) { compare<BFloat16>(); }
TEST_P(EntmaxCuda, Float16) { compare<Float16>(); }

INSTANTIATE_TEST_SUITE_P(Cases, EntmaxCuda,
                         testing::Values(Case{"no_tokens", 0, 8}, Case{"one_expert", 3, 1},
                                         Case{"one_token", 1, 8}, Case{"a_warp", 9, 32},
                                         Case{"more", 5, 33}, Case{"wide", 3, 300},
                                         Case{"blocks", 130, 6}),
                         [](const auto& info) { return info.param.name; });

TEST(EntmaxCuda, SpecialRows) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  for (const double alpha : {1.0, 1.3, 1.5, 2.0, 2.5, 0.5}) {
    auto q = EntmaxProblem<float>::random(7, 5, alpha);
    q.is_learned = true;
    q.valid.assign(7, 1);
    q.valid[5] = q.valid[6] = 0;
    for (int64_t e = 0; e < 5; ++e) q.logits[e] = -kInfinity, q.logits[25 + e] = kNaN;
    q.logits[5 + 3] = kNaN;
    q.logits[10 + 4] = kInfinity;
    q.logits[15 + 2] = -kInfinity;
    expect_cuda_equals_cpu(q);
  }
}

}  // namespace
}  // namespace torch_routers
