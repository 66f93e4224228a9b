// Capacities on several threads: for ThreadSanitizer, and the same plan as on one.
#include <gtest/gtest.h>

#include "limit_capacity_problem.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

CapacityResults run(const CapacityProblem<float>& p, int threads) {
  return limit_capacity_steps<HostArray>(p, [&](const auto& params, int64_t count) {
    // Of a range of one the operator makes one call.
    run_on_threads(count == 1 ? 1 : threads, count,
                   [&](int64_t begin, int64_t end) { limit_capacity_cpu(params, begin, end); });
  });
}

TEST(LimitCapacityThreads, GiveTheSamePlan) {
  for (const auto policy :
       {DropPolicy::Position, DropPolicy::Weight, DropPolicy::Priority, DropPolicy::Random})
    for (const int64_t capacity : {0, 40, 10000}) {
      const auto p = capacity_problem<float>({2100, 500, 4, 7, 3}, policy, capacity, "ties");
      const CapacityResults expected = run(p, 1);
      for (const int threads : {2, 3, 4, 8})
        EXPECT_TRUE(run(p, threads) == expected) << capacity << ", " << threads << " threads";
    }
}

}  // namespace
}  // namespace torch_routers
