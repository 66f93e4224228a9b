// The entropy gate on several threads: for ThreadSanitizer, and to the same bits as on one.
#include <gtest/gtest.h>

#include "entropy_gate_problem.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

TEST(EntropyGateThreads, GiveTheSameBits) {
  const EntropyProblem<float> problem(1000, 9);
  const auto on = [&](int threads) {
    return problem.run<HostArray>([&](const auto& params, int64_t tokens) {
      run_on_threads(threads, tokens,
                     [&](int64_t begin, int64_t end) { entropy_gate_cpu(params, begin, end); });
    });
  };
  const EntropyResults<float> expected = on(1);
  for (const int threads : {2, 3, 4, 8}) EXPECT_TRUE(on(threads) == expected) << threads;
}

}  // namespace
}  // namespace torch_routers
