// Dispatch on several threads: for ThreadSanitizer, and to the same bits as on one.
#include <gtest/gtest.h>

#include <vector>

#include "common/stream.h"
#include "threads.h"
#include "token_dispatch_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

// All results, one after the other.
std::vector<float> run(const DispatchProblem<float>& p, bool streamed, int threads) {
  const DispatchPlan plan = p.plan(p.order.data(), p.inverse.data());
  DispatchPlan large = plan;
  if (streamed) large.max_rows += kStreamBytes;  // only what the plan names is written
  const std::size_t rows = p.row.size(), tokens = p.token.size();
  std::vector<float> results(2 * rows + tokens + p.inverse.size());
  float *row = results.data(), *grad_row = row + rows, *token = grad_row + rows,
        *grad_weights = token + tokens;
  const auto on_threads = [&](const auto& params, int64_t count) {
    run_on_threads(threads, count,
                   [&](int64_t begin, int64_t end) { dispatch_cpu(params, begin, end); });
  };
  on_threads(Permute<float>{large, p.token.data(), p.weights.data(), row}, plan.tokens);
  on_threads(ClearUnused<float>{plan, row}, plan.max_rows);
  on_threads(Combine<float>{plan, row, p.weights.data(), token}, plan.tokens);
  on_threads(CombineBackward<float>{large, token, row, p.weights.data(), grad_row, grad_weights},
             plan.tokens);
  on_threads(ClearUnused<float>{plan, grad_row}, plan.max_rows);
  return results;
}

TEST(TokenDispatchThreads, GiveTheSameBits) {
  for (const DispatchCase& c :
       {DispatchCase{400, 3, 33, 40, .2}, DispatchCase{50, 20, 601, 10, .1}, DispatchCase{3, 2, 5}})
    for (const bool streamed : {false, true}) {
      const DispatchProblem<float> p(c);
      const auto expected = run(p, streamed, 1);
      for (const int threads : {2, 3, 4, 8}) EXPECT_EQ(run(p, streamed, threads), expected) << c;
    }
}

}  // namespace
}  // namespace torch_routers
