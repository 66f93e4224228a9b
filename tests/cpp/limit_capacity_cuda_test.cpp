// The CUDA kernels against the CPU kernels, to the bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_array.h"
#include "limit_capacity_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

template <class T> CapacityResults run_cpu(const CapacityProblem<T>& p) {
  return limit_capacity_steps<HostArray>(
      p, [](const auto& params, int64_t count) { limit_capacity_cpu(params, 0, count); });
}
template <class T> CapacityResults run_cuda(const CapacityProblem<T>& p) {
  return limit_capacity_steps<DeviceArray>(
      p, [](const auto& params, int64_t) { limit_capacity_cuda(params, nullptr); });
}

template <class T> void expect_cuda_equals_cpu(const CapacityProblem<T>& p) {
  const CapacityResults cpu = run_cpu(p), cuda = run_cuda(p);
  EXPECT_EQ(cuda.order, cpu.order);
  EXPECT_EQ(cuda.inverse, cpu.inverse);
  EXPECT_EQ(cuda.counts, cpu.counts);
  EXPECT_EQ(cuda.offsets, cpu.offsets);
  EXPECT_EQ(cuda.dropped, cpu.dropped);
}

struct Case {
  CapacityShape shape;
  int64_t capacity;
  std::string scores = "normal";
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.shape.rows << "_rows_" << c.shape.tokens << "x" << c.shape.slots << "_"
             << c.shape.experts << "_experts_" << c.shape.groups << "_groups_capacity_"
             << c.capacity << "_" << c.scores;
}

class LimitCapacityCuda : public testing::TestWithParam<Case> {
 protected:
  template <class T> void compare(DropPolicy policy, unsigned seed = 0) {
    const Case& c = GetParam();
    expect_cuda_equals_cpu(capacity_problem<T>(c.shape, policy, c.capacity, c.scores, seed));
  }
};
TEST_P(LimitCapacityCuda, Position) { compare<float>(DropPolicy::Position); }
TEST_P(LimitCapacityCuda, Weight) { compare<float>(DropPolicy::Weight); }
TEST_P(LimitCapacityCuda, WeightDouble) { compare<double>(DropPolicy::Weight); }
TEST_P(LimitCapacityCuda, PriorityBFloat16) { compare<BFloat16>(DropPolicy::Priority); }
TEST_P(LimitCapacityCuda, PriorityFloat16) { compare<Float16>(DropPolicy::Priority); }
TEST_P(LimitCapacityCuda, Random) { compare<float>(DropPolicy::Random); }
TEST_P(LimitCapacityCuda, RandomWithRowIds) { compare<float>(DropPolicy::Random, 1); }

INSTANTIATE_TEST_SUITE_P(Cases, LimitCapacityCuda,
                         testing::Values(
                             // rows, tokens, slots, experts, groups
                             Case{{0, 0, 2, 3, 1}, 1}, Case{{4, 0, 2, 3, 2}, 1},
                             Case{{5, 6, 0, 3, 1}, 1}, Case{{1, 1, 1, 1, 1}, 0},
                             Case{{1, 1, 1, 1, 1}, 1}, Case{{80, 40, 2, 4, 1}, 0},
                             Case{{80, 40, 2, 4, 1}, 1}, Case{{90, 40, 2, 4, 1}, 7, "ties"},
                             Case{{80, 40, 2, 4, 1}, 100}, Case{{160, 40, 4, 5, 7}, 3, "special"},
                             Case{{160, 40, 4, 70, 5}, 1, "ties"}, Case{{700, 350, 2, 2, 1}, 255},
                             Case{{700, 350, 2, 2, 1}, 256, "ties"},
                             Case{{1100, 350, 3, 2, 2}, 100, "special"},
                             Case{{900, 3, 300, 2, 1}, 200}, Case{{300, 1, 300, 1, 1}, 258}),
                         testing::PrintToStringParamName());

// No access out of bounds, and nothing uninitialised: the tools watch. A plan of its own is not
// promised, but each row is a slot or -1, and each slot a row or -1.
TEST(LimitCapacityCudaGuards, PlansThatMakeNoSense) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  using Values = std::vector<int64_t>;
  const auto run = [](auto p) {
    const CapacityResults r = run_cuda(p);
    const int64_t rows = p.shape.rows;
    EXPECT_GE(r.offsets.front(), 0);
    EXPECT_LE(r.offsets.back(), rows);
    for (std::size_t e = 0; e < r.counts.size(); ++e)
      EXPECT_EQ(r.offsets[e] + r.counts[e], r.offsets[e + 1]);
    for (const int64_t row : r.inverse) EXPECT_TRUE(-1 <= row && row < rows) << row;
    for (int64_t row = r.offsets.back(); row < rows; ++row) EXPECT_EQ(r.order[row], -1);
    return r;
  };
  for (const auto policy :
       {DropPolicy::Position, DropPolicy::Weight, DropPolicy::Priority, DropPolicy::Random}) {
    const auto good = capacity_problem<float>({130, 60, 2, 3, 4}, policy, 5);
    for (const Values& offsets :
         {Values{0, 200, 100, 1000}, Values{-5, -3, 2, 3}, Values{0, 50, 40, 130},
          Values{7, 8, 9, 10}, Values{0, 10, 20, kMost}, Values{kMost, -kMost, kMost, -kMost}}) {
      auto p = good;
      p.offsets = offsets;
      EXPECT_EQ(run(p).offsets, Values(4, 0));
    }
    for (const Values& ends : {Values{0, 30, 20, 40, 60}, Values{-3, -2, -1, 0, 60},
                               Values{0, 1, 2, 3, kMost}, Values{5, 6, 7, 8, 9}}) {
      auto p = good;
      p.group_offsets = ends;
      EXPECT_EQ(run(p).offsets, Values(4, 0));
    }
    for (const Values& slots :
         {Values{-1, 120, kMost, -kMost}, Values{5, 5, 5}, Values{100, 3, 77}}) {
      auto p = good;
      for (int64_t row = 0; row < p.shape.rows; ++row) p.order[row] = slots[row % slots.size()];
      const CapacityResults r = run(p);
      for (const int64_t slot : r.order)
        EXPECT_TRUE(slot == -1 || std::count(slots.begin(), slots.end(), slot)) << slot;
    }
    auto p = good;
    for (std::size_t slot = 0; slot < p.inverse.size(); ++slot)
      p.inverse[slot] = slot % 3 ? kMost : -2;
    run(p);
    p = good;
    p.capacity = {-1, -kMost, 2, kMost};
    auto clamped = good;
    clamped.capacity = {0, 0, 2, 1000};
    EXPECT_EQ(run(p), run_cpu(clamped));
  }
}

TEST(LimitCapacityCudaGuards, TooLargeAGridIsAnError) {
  CapacityRenumber params{};
  params.rows = int64_t{1} << 40;
  EXPECT_THROW(limit_capacity_cuda(params, nullptr), std::runtime_error);
}

}  // namespace
}  // namespace torch_routers
