// The plan on several threads: for ThreadSanitizer, and the same as on one.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "expert_plan/expert_plan_kernel.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

// Order, inverse, counts, offsets and dropped, one after the other.
template <class T>
std::vector<int64_t> run(const std::vector<T>& experts_of, int64_t slots, int64_t experts,
                         int64_t max_rows, int threads) {
  const auto size = static_cast<int64_t>(experts_of.size());
  std::vector<int64_t> bins(threads * (experts + 2)), plan(max_rows + size + 2 * experts + 2);
  int64_t *order = plan.data(), *inverse = order + max_rows, *counts = inverse + size,
          *offsets = counts + experts, *dropped = offsets + experts + 1;
  const ExpertPlan<T> p{size / slots, slots,   experts, max_rows, threads, bins.data(),
                        order,        inverse, counts,  offsets,  dropped, experts_of.data()};
  run_on_threads(threads, threads, [&](int64_t begin, int64_t end) {
    TORCH_ROUTERS_PICK_ISA(isa(), count_slots(p, begin, end));
  });
  TORCH_ROUTERS_PICK_ISA(isa(), place_experts(p));
  run_on_threads(threads, threads, [&](int64_t begin, int64_t end) {
    TORCH_ROUTERS_PICK_ISA(isa(), place_slots(p, begin, end));
  });
  return plan;
}

template <class T> void expect_the_same_plans(const std::vector<T>& experts_of, int64_t slots,
                                              int64_t experts) {
  const auto size = static_cast<int64_t>(experts_of.size());
  for (const int64_t max_rows : {size / 3, size, size + 1000}) {
    const auto expected = run(experts_of, slots, experts, max_rows, 1);
    for (const int threads : {2, 3, 4, 8})
      EXPECT_EQ(run(experts_of, slots, experts, max_rows, threads), expected) << threads;
  }
}

TEST(ExpertPlanThreads, GiveTheSamePlan) {
  constexpr int64_t kTokens = 1000, kExperts = 33;
  std::mt19937 random(0);
  std::vector<int64_t> all(kTokens * 3), some(all.size());
  std::vector<float> weights(kTokens * kExperts);
  for (int64_t& expert : all) expert = random() % kExperts;
  for (int64_t& expert : some) expert = static_cast<int64_t>(random() % (kExperts + 1)) - 1;
  for (float& weight : weights) weight = static_cast<float>(random() % 3);
  expect_the_same_plans(all, 3, kExperts);
  expect_the_same_plans(some, 3, kExperts);
  expect_the_same_plans(weights, kExperts, kExperts);
}

}  // namespace
}  // namespace torch_routers
