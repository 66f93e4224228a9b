// Tokens whose gates lie beyond the first 2^31 numbers: the same step as of those tokens alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "gru_cell_problem.h"
#include "sparse.h"

namespace torch_routers {
namespace {

using std::int64_t;

TEST(GruCellLarge, TheLastTokens) {
  constexpr int64_t kSize = 7, kLast = 5, kTokens = (int64_t{1} << 31) / kSize + 11;
  const GruProblem<float> problem(kLast, kSize);
  const auto expected =
      problem.run<HostArray>([](const auto& p, int64_t tokens) { gru_cell_cpu(p, 0, tokens); });
  const Sparse<float> a(kTokens * 3 * kSize), b(kTokens * 3 * kSize), h(kTokens * kSize),
      next(kTokens * kSize);
  if (!(a && b && h && next)) GTEST_SKIP() << "no room for so many tokens";
  const int64_t first = kTokens - kLast;
  std::copy(problem.input_gates.begin(), problem.input_gates.end(), a.data() + first * 3 * kSize);
  std::copy(problem.hidden_gates.begin(), problem.hidden_gates.end(), b.data() + first * 3 * kSize);
  std::copy(problem.state.begin(), problem.state.end(), h.data() + first * kSize);
  const Sparse<bool> valid(kTokens);
  if (!valid) GTEST_SKIP() << "no room for so many tokens";
  for (int64_t t = 0; t < kLast; ++t) valid.data()[first + t] = problem.valid[t];
  const GruStep<float> step{kTokens, kSize, a.data(), b.data(), h.data(), valid.data()};
  gru_cell_cpu(GruCell<float>{step, next.data()}, first, kTokens);
  const std::vector<float> last(next.data() + first * kSize, next.data() + kTokens * kSize);
  EXPECT_EQ(last, expected.next);
}

}  // namespace
}  // namespace torch_routers
