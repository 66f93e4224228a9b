// The recurrent cell on several threads: for ThreadSanitizer, and to the same bits as on one.
#include <gtest/gtest.h>

#include "gru_cell_problem.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

TEST(GruCellThreads, GiveTheSameBits) {
  const GruProblem<float> problem(3000, 21);
  const auto on = [&](int threads) {
    return problem.run<HostArray>([&](const auto& params, int64_t tokens) {
      run_on_threads(threads, tokens,
                     [&](int64_t begin, int64_t end) { gru_cell_cpu(params, begin, end); });
    });
  };
  const GruResults<float> expected = on(1);
  for (const int threads : {2, 3, 4, 8}) EXPECT_TRUE(on(threads) == expected) << threads;
}

}  // namespace
}  // namespace torch_routers
