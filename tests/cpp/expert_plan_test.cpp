// The plan's CPU kernels on every instruction set, against a plain stable sort. Memory is exact, so
// that sanitizers see each slip.
#include "expert_plan/expert_plan_kernel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "common/scalar.h"

namespace torch_routers {
namespace {

using std::int64_t;
using Integers = std::vector<int64_t>;

struct Plan {
  Integers order, inverse, counts, offsets;
  int64_t dropped;
  bool operator==(const Plan&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Plan& plan) {
  for (const Integers& values : {plan.order, plan.inverse, plan.counts, plan.offsets})
    out << testing::PrintToString(values) << "\n";
  return out << plan.dropped;
}

// By a sort. `expert_of`: of each slot, or -1.
Plan sorted(const Integers& expert_of, int64_t experts, int64_t max_rows) {
  Integers order;
  for (std::size_t slot = 0; slot < expert_of.size(); ++slot)
    if (expert_of[slot] >= 0) order.push_back(static_cast<int64_t>(slot));
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return expert_of[a] < expert_of[b]; });
  const auto live = static_cast<int64_t>(order.size());
  order.resize(max_rows, -1);
  Plan plan{order, Integers(expert_of.size(), -1), Integers(experts), Integers(experts + 1),
            std::max<int64_t>(0, live - max_rows)};
  for (int64_t row = 0; row < std::min(live, max_rows); ++row) {
    plan.inverse[order[row]] = row;
    ++plan.counts[expert_of[order[row]]];
  }
  std::partial_sum(plan.counts.begin(), plan.counts.end(), plan.offsets.begin() + 1);
  return plan;
}

// Of parts of fixed size of a long array, at the addresses it would have.
template <class T> T* begin_of(std::vector<T>& part, int64_t first) {
  return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(part.data()) - first * sizeof(T));
}

class ExpertPlanKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }

  template <class T> void count(const ExpertPlan<T>& p, int64_t begin, int64_t end) {
    TORCH_ROUTERS_PICK_ISA(GetParam(), count_slots(p, begin, end));
  }
  template <class T> void place(const ExpertPlan<T>& p, int64_t begin, int64_t end) {
    TORCH_ROUTERS_PICK_ISA(GetParam(), place_slots(p, begin, end));
  }

  template <class T>
  Plan run(const std::vector<T>& experts_of, int64_t slots, int64_t experts, int64_t max_rows,
           int64_t parts) {
    const auto size = static_cast<int64_t>(experts_of.size());
    Plan plan{Integers(max_rows, 7), Integers(size, 7), Integers(experts, 7),
              Integers(experts + 1, 7), 7};
    Integers bins(parts * (experts + 2), 7);
    const ExpertPlan<T> p{size / slots,
                          slots,
                          experts,
                          max_rows,
                          parts,
                          bins.data(),
                          plan.order.data(),
                          plan.inverse.data(),
                          plan.counts.data(),
                          plan.offsets.data(),
                          &plan.dropped,
                          experts_of.data()};
    count(p, parts / 2, parts);  // in any order
    count(p, 0, parts / 2);
    TORCH_ROUTERS_PICK_ISA(GetParam(), place_experts(p));
    place(p, parts / 2, parts);
    place(p, 0, parts / 2);
    return plan;
  }
};

Integers random_experts(int64_t size, int64_t experts, double live, std::mt19937& random) {
  Integers expert_of(size);
  for (int64_t& e : expert_of) {
    const bool has_expert = std::uniform_real_distribution<>()(random) < live;
    e = has_expert ? static_cast<int64_t>(random() % experts) : -1;
  }
  return expert_of;
}

TEST_P(ExpertPlanKernel, IsAStableSortByIndex) {
  std::mt19937 random(1);
  for (const int64_t tokens : {0, 1, 2, 7, 33, 300})
    for (const int64_t slots : {1, 2, 5})
      for (const int64_t experts : {1, 2, 8, 65})
        for (const double live : {0.0, 0.3, 1.0}) {
          const int64_t size = tokens * slots;
          const Integers experts_of = random_experts(size, experts, live, random);
          for (const int64_t max_rows : {int64_t{0}, size / 4, size / 2, size, size + 5})
            for (const int64_t parts : {1, 2, 7})
              ASSERT_EQ(run(experts_of, slots, experts, max_rows, parts),
                        sorted(experts_of, experts, max_rows))
                  << tokens << "x" << slots << ", " << experts << " experts, " << live << " live, "
                  << max_rows << " rows, " << parts << " parts";
        }
}

TEST_P(ExpertPlanKernel, ExpertsMayBeEmpty) {
  Integers experts_of(50, 40);
  experts_of[7] = experts_of[49] = 3;
  EXPECT_EQ(run(experts_of, 2, 100, 50, 3), sorted(experts_of, 100, 50));
}

TEST_P(ExpertPlanKernel, CountsIndicesOutOfRange) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const Integers experts_of{-2, 0, 3, -1, 2, kMost, -kMost - 1, 1};
  Integers bins(10);
  ExpertPlan<int64_t> p{4, 2, 3, 8, 2, bins.data(), {}, {}, {}, {}, {}, experts_of.data()};
  count(p, 0, 2);
  EXPECT_EQ(bins, (Integers{1, 1, 0, 0, 2, 0, 0, 1, 1, 2}));
  EXPECT_EQ(p.out_of_range(0), 2);
  EXPECT_EQ(p.out_of_range(1), 2);
}

template <class T> T number(double value) {
  T result;
  store(&result, static_cast<Compute<T>>(value));
  return result;
}

template <class T, class Run> void expect_sorted_by_weight(const Run& run) {
  std::mt19937 random(2);
  using Limits = std::numeric_limits<Compute<T>>;
  const std::vector<T> kinds{number<T>(0),
                             number<T>(-0.0),
                             number<T>(1),
                             number<T>(-2),
                             number<T>(Limits::infinity()),
                             number<T>(Limits::quiet_NaN())};
  for (const int64_t tokens : {0, 1, 9, 40})
    for (const int64_t experts : {1, 3, 63, 64, 65, 130})
      for (const unsigned zeros : {0, 2, 40}) {
        const int64_t size = tokens * experts;
        std::vector<T> weights(size);
        Integers expert_of(size, -1);
        for (int64_t i = 0; i < size; ++i) {
          const unsigned kind = random() % (6 + zeros);
          weights[i] = kinds[kind < 6 ? kind : 0];
          if (2 <= kind && kind < 6) expert_of[i] = i % experts;
        }
        for (const int64_t max_rows : {int64_t{0}, size / 4, size, size + 3})
          for (const int64_t parts : {1, 2, 7})
            ASSERT_EQ(run(weights, experts, max_rows, parts), sorted(expert_of, experts, max_rows))
                << tokens << "x" << experts << ", " << max_rows << " rows, " << parts << " parts";
      }
}

TEST_P(ExpertPlanKernel, IsAStableSortByWeight) {
  const auto run = [&](const auto& weights, int64_t experts, int64_t max_rows, int64_t parts) {
    return this->run(weights, experts, experts, max_rows, parts);
  };
  expect_sorted_by_weight<float>(run);
  expect_sorted_by_weight<double>(run);
  expect_sorted_by_weight<BFloat16>(run);
  expect_sorted_by_weight<Float16>(run);
}

TEST_P(ExpertPlanKernel, TheSmallestNumberIsNotZero) {
  EXPECT_EQ(run<float>({1e-45f, 0}, 2, 2, 2, 1).counts, (Integers{1, 0}));
  EXPECT_EQ(run<double>({5e-324, 0}, 2, 2, 2, 1).counts, (Integers{1, 0}));
  EXPECT_EQ(run<BFloat16>({{1}, {0x8000}}, 2, 2, 2, 1).counts, (Integers{1, 0}));
  EXPECT_EQ(run<Float16>({{0x8001}, {0x8000}}, 2, 2, 2, 1).counts, (Integers{1, 0}));
}

// The last of many parts, whose slots and rows have numbers beyond 32 bits; only what belongs to it
// is there.
TEST_P(ExpertPlanKernel, LargeNumbersByIndex) {
  constexpr int64_t kTokens = int64_t{3} << 31, kExperts = 3, kLength = 8;
  constexpr int64_t kParts = 2 * kTokens / kLength, kFirst = 2 * kTokens - kLength;
  constexpr int64_t kRow = int64_t{1}
                           << 32;  // of the first slot of each expert, and 100 per expert
  std::vector<int64_t> experts_of{2, 0, -1, 1, 0, 2, 2, -1};
  Integers bins(kExperts + 2), order(300, 7), inverse(kLength, 7);
  Integers offsets{0, kRow, kRow + 100, 2 * kTokens - 50};
  const ExpertPlan<int64_t> p{kTokens,
                              2,
                              kExperts,
                              2 * kTokens,
                              kParts,
                              begin_of(bins, (kParts - 1) * (kExperts + 2)),
                              begin_of(order, kRow),
                              begin_of(inverse, kFirst),
                              nullptr,
                              offsets.data(),
                              nullptr,
                              begin_of(experts_of, kFirst)};
  count(p, kParts - 1, kParts);
  EXPECT_EQ(bins, (Integers{2, 2, 1, 3, 0}));
  bins = {kRow + 250, kRow, kRow + 100, kRow + 200, 0};
  place(p, kParts - 1, kParts);
  const Integers expected{kRow + 200, kRow, -1, kRow + 100, kRow + 1, kRow + 201, kRow + 202, -1};
  EXPECT_EQ(inverse, expected);
  for (int64_t i = 0; i < kLength; ++i)
    if (expected[i] >= 0) { EXPECT_EQ(order[expected[i] - kRow], kFirst + i); }
  EXPECT_EQ(order[250], -1);
  EXPECT_EQ(order[251], -1);
}

TEST_P(ExpertPlanKernel, LargeNumbersByWeight) {
  constexpr int64_t kTokens = int64_t{3} << 30, kExperts = 3, kFirst = (kTokens - 2) * kExperts;
  constexpr int64_t kRow = int64_t{1} << 32;
  std::vector<float> weights{0, 1, 0, 1, 1, 0};
  Integers bins(kExperts + 2), order(8, 7), inverse(6, 7), offsets{0, kRow, kRow + 4, kRow + 8};
  const ExpertPlan<float> p{kTokens,
                            kExperts,
                            kExperts,
                            kRow + 8,
                            kTokens / 2,
                            begin_of(bins, (kTokens / 2 - 1) * (kExperts + 2)),
                            begin_of(order, kRow),
                            begin_of(inverse, kFirst),
                            nullptr,
                            offsets.data(),
                            nullptr,
                            begin_of(weights, kFirst)};
  count(p, kTokens / 2 - 1, kTokens / 2);
  EXPECT_EQ(bins, (Integers{0, 1, 2, 0, 0}));
  bins = {0, kRow, kRow + 4, kRow + 8, 0};
  place(p, kTokens / 2 - 1, kTokens / 2);
  EXPECT_EQ(inverse, (Integers{-1, kRow + 4, -1, kRow, kRow + 5, -1}));
  EXPECT_EQ(order, (Integers{kFirst + 3, 7, 7, 7, kFirst + 1, kFirst + 4, 7, 7}));
}

TEST_P(ExpertPlanKernel, LargeNumbersOfRows) {
  constexpr int64_t kMany = int64_t{3} << 31;
  Integers bins{5, kMany, 1, 2, 0, kMany, 3, kMany, 4, 0}, counts(3, 7), offsets(4, 7);
  int64_t dropped = 7;
  const ExpertPlanRows p{2 * kMany,   2,       3,       2 * kMany + 6, 2,
                         bins.data(), nullptr, nullptr, counts.data(), offsets.data(),
                         &dropped};
  TORCH_ROUTERS_PICK_ISA(GetParam(), place_experts(p));
  EXPECT_EQ(counts, (Integers{kMany + 3, kMany + 1, 2}));
  EXPECT_EQ(offsets, (Integers{0, kMany + 3, 2 * kMany + 4, 2 * kMany + 6}));
  EXPECT_EQ(dropped, 4);
  EXPECT_EQ(bins, (Integers{2 * kMany + 10, 0, kMany + 3, 2 * kMany + 4, 0, 2 * kMany + 15, kMany,
                            kMany + 4, 2 * kMany + 6, 0}));
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, ExpertPlanKernel,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

}  // namespace
}  // namespace torch_routers
