// ragged_select on several threads: for ThreadSanitizer, and to the same bits as on one.
#include <gtest/gtest.h>

#include "ragged_select_problem.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

TEST(RaggedSelectThreads, GiveTheSameBits) {
  const RaggedProblem<float> problem(1000, 9, 6);
  const auto on = [&](int threads) {
    return problem.run<HostArray>([&](const auto& params, int64_t tokens) {
      run_on_threads(threads, tokens,
                     [&](int64_t begin, int64_t end) { ragged_select_cpu(params, begin, end); });
    });
  };
  const std::vector<int64_t> expected = on(1);
  for (const int threads : {2, 3, 4, 8}) EXPECT_EQ(on(threads), expected) << threads;
}

}  // namespace
}  // namespace torch_routers
