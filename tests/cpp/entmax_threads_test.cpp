// Entmax on several threads: for ThreadSanitizer, and to the same bits as on one.
#include <gtest/gtest.h>

#include "entmax_problem.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

TEST(EntmaxThreads, GiveTheSameBits) {
  for (const double alpha : {1.5, 2.0, 1.7})
    for (const int64_t experts : {9, 300}) {
      auto q = EntmaxProblem<float>::random(1000, experts, alpha);
      q.is_learned = true;
      const auto run = [&](int threads) {
        return run_entmax<HostArray>(q, [&](const auto& params, int64_t count) {
          run_on_threads(count == 1 ? 1 : threads, count,
                         [&](int64_t begin, int64_t end) { entmax_cpu(params, begin, end); });
        });
      };
      const auto expected = run(1);
      for (const int threads : {2, 3, 4, 8}) EXPECT_EQ(run(threads), expected) << threads;
    }
}

}  // namespace
}  // namespace torch_routers
