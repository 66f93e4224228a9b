// The CUDA kernels against the CPU kernels: the same plans.
#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/scalar.h"
#include "device_array.h"
#include "expert_plan/expert_plan_kernel.h"

namespace torch_routers {
namespace {

using std::int64_t;
using Integers = std::vector<int64_t>;

struct Case {
  int64_t tokens, experts, slots;
  std::string kind = "most";  // see random_indices()
  int64_t max_rows = -1;      // as many as slots
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << c.tokens << "x" << c.slots << "_" << c.experts << "_" << c.kind;
  if (c.max_rows >= 0) out << "_rows_" << c.max_rows;
  return out;
}

int64_t random_index(const Case& c, std::mt19937& random) {
  const auto any = static_cast<int64_t>(random() % c.experts);
  if (c.kind == "none") return -1;
  if (c.kind == "last") return c.experts - 1;
  if (c.kind == "few") return random() % 4 ? -1 : any;
  if (c.kind == "skewed") return random() % 8 ? any / 7 : any;
  return random() % 16 ? any : -1;  // "most"
}

struct Plan {
  Integers order, inverse, counts, offsets, dropped;
};

template <class T>
Plan run_cuda(const std::vector<T>& experts_of, int64_t slots, int64_t experts, int64_t max_rows) {
  const auto size = static_cast<int64_t>(experts_of.size());
  const DeviceArray<T> input(experts_of);
  const DeviceArray<int64_t> order(max_rows), inverse(size), counts(experts), offsets(experts + 1),
      dropped(1);
  ExpertPlan<T> p{size / slots,   slots,        experts,        max_rows,      1,
                  nullptr,        order.data(), inverse.data(), counts.data(), offsets.data(),
                  dropped.data(), input.data()};
  p.parts = p.cuda_parts();
  const DeviceArray<int64_t> bins(p.parts * experts);
  p.bins = bins.data();
  expert_plan_cuda(p, nullptr);
  return {order.to_host(), inverse.to_host(), counts.to_host(), offsets.to_host(),
          dropped.to_host()};
}

template <class T>
Plan run_cpu(const std::vector<T>& experts_of, int64_t slots, int64_t experts, int64_t max_rows) {
  const auto size = static_cast<int64_t>(experts_of.size());
  Plan plan{Integers(max_rows), Integers(size), Integers(experts), Integers(experts + 1),
            Integers(1)};
  Integers bins(experts + 2);
  const ExpertPlan<T> p{size / slots,
                        slots,
                        experts,
                        max_rows,
                        1,
                        bins.data(),
                        plan.order.data(),
                        plan.inverse.data(),
                        plan.counts.data(),
                        plan.offsets.data(),
                        plan.dropped.data(),
                        experts_of.data()};
  Default::count_slots(p, 0, 1);
  Default::place_experts(p);
  Default::place_slots(p, 0, 1);
  return plan;
}

void expect_equal(const Plan& cuda, const Plan& cpu) {
  EXPECT_EQ(cuda.offsets, cpu.offsets);
  EXPECT_EQ(cuda.counts, cpu.counts);
  EXPECT_EQ(cuda.dropped, cpu.dropped);
  EXPECT_EQ(cuda.order, cpu.order);
  EXPECT_EQ(cuda.inverse, cpu.inverse);
}

template <class T>
void expect_cuda_equals_cpu(const std::vector<T>& experts_of, int64_t slots, int64_t experts,
                            int64_t max_rows) {
  expect_equal(run_cuda(experts_of, slots, experts, max_rows),
               run_cpu(experts_of, slots, experts, max_rows));
}

class ExpertPlanCuda : public testing::TestWithParam<Case> {};

TEST_P(ExpertPlanCuda, ByIndex) {
  const Case& c = GetParam();
  std::mt19937 random(static_cast<unsigned>(c.tokens + c.experts));
  Integers indices(c.tokens * c.slots);
  for (int64_t& index : indices) index = random_index(c, random);
  const auto size = static_cast<int64_t>(indices.size());
  expect_cuda_equals_cpu(indices, c.slots, c.experts, c.max_rows < 0 ? size : c.max_rows);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ExpertPlanCuda,
    testing::Values(
        // slots: none, one, parts of a warp, several parts, several blocks
        Case{0, 8, 2}, Case{0, 8, 2, "most", 70}, Case{1, 1, 1}, Case{1, 3, 1, "none"},
        Case{5, 4, 2}, Case{16, 8, 2}, Case{33, 8, 1, "last"}, Case{128, 8, 2, "skewed"},
        Case{129, 8, 2, "few"}, Case{700, 7, 3}, Case{1500, 2, 2, "skewed"}, Case{2200, 8, 4},
        Case{900, 8, 4, "none"}, Case{16450, 3, 4},
        // experts: up to 256, 1024 and 4096 in a warp, beyond it in several
        Case{300, 129, 4, "skewed"}, Case{300, 256, 4}, Case{150, 257, 8},
        Case{500, 600, 8, "last"}, Case{1200, 1025, 8, "few"}, Case{2100, 4097, 4},
        // rows: none, too few, too many
        Case{300, 8, 2, "most", 0}, Case{300, 8, 2, "most", 100}, Case{300, 8, 2, "few", 150},
        Case{400, 40, 3, "last", 1000}, Case{300, 8, 2, "few", 900}),
    testing::PrintToStringParamName());

template <class T> struct ExpertPlanCudaByWeight : testing::Test {};
using Scalars = testing::Types<float, double, BFloat16, Float16>;
TYPED_TEST_SUITE(ExpertPlanCudaByWeight, Scalars);

TYPED_TEST(ExpertPlanCudaByWeight, EqualsCpu) {
  using Limits = std::numeric_limits<Compute<TypeParam>>;
  std::vector<TypeParam> kinds(8);
  const double values[]{0, -0.0, 1, -2, Limits::infinity(), Limits::quiet_NaN(), 0, 0};
  for (int i = 0; i < 8; ++i) store(&kinds[i], static_cast<Compute<TypeParam>>(values[i]));
  std::mt19937 random(3);
  for (const int64_t experts : {1, 3, 64, 130})
    for (const int64_t tokens : {0, 1, 13}) {
      std::vector<TypeParam> weights(tokens * experts);
      for (TypeParam& weight : weights) weight = kinds[random() % 8];
      const auto size = static_cast<int64_t>(weights.size());
      for (const int64_t max_rows : {size / 4, size}) {
        SCOPED_TRACE(testing::Message() << tokens << "x" << experts << " rows " << max_rows);
        expect_cuda_equals_cpu(weights, experts, experts, max_rows);
      }
    }
}

TEST(ExpertPlanCudaWeights, TheSmallestNumberIsNotZero) {
  expect_cuda_equals_cpu<float>({1e-45f, 0, -0.0f, -1e-45f}, 2, 2, 4);
  expect_cuda_equals_cpu<double>({5e-324, 0, -0.0, -5e-324}, 2, 2, 4);
}

// The operator looks at indices on the CPU only: there such a slot is an error, here it has no row.
TEST(ExpertPlanCudaIndices, OutOfRangeHaveNoRow) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  for (const int64_t experts : {8, 200, 4100}) {
    std::mt19937 random(4);
    Integers indices(600);
    for (int64_t& index : indices) index = static_cast<int64_t>(random() % experts);
    Integers without = indices;
    int64_t slot = 0;
    for (const int64_t bad : {int64_t{-2}, experts, experts + 1, int64_t{1} << 32, kMost, -kMost}) {
      indices[slot] = bad;
      without[slot] = -1;
      slot += 77;
    }
    expect_equal(run_cuda(indices, 2, experts, 600), run_cpu(without, 2, experts, 600));
  }
}

// Memory for the counts is less than for the slots, and one block can add up those of an expert.
TEST(ExpertPlanCudaParts, AreFew) {
  for (const int64_t experts : {1, 8, 100, 4096, 100000})
    for (int shift = 0; shift < 50; ++shift) {
      ExpertPlanRows p{};
      p.tokens = (int64_t{1} << shift) + 1;
      p.slots = 3;
      p.experts = experts;
      EXPECT_GE(p.cuda_parts() * p.cuda_part_size(), p.size());
      EXPECT_LT((p.cuda_parts() - 1) * p.cuda_part_size(), p.size());
      EXPECT_LE(p.cuda_parts(), p.kMostCudaParts);
      EXPECT_LE((p.cuda_parts() - 1) * experts, p.size());
      EXPECT_EQ(p.cuda_part_size() % 32, 0);
    }
}

}  // namespace
}  // namespace torch_routers
