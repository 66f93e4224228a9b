// limit_capacity's CPU kernels on every instruction set, in pieces, against one sort per segment.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "common/philox.h"
#include "common/score.h"
#include "limit_capacity_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

// What ranks first is smallest.
template <class T>
std::tuple<int64_t, std::uint64_t, int64_t> rank(const CapacityProblem<T>& p, int64_t expert,
                                                 int64_t slot) {
  const int64_t token = slot / p.shape.slots, j = slot % p.shape.slots;
  const auto by = [&](T score) {
    const auto key = rank_key(load(score));
    return std::tuple(-static_cast<int64_t>(key >> 1), std::uint64_t{1 - (key & 1)}, slot);
  };
  if (p.policy == DropPolicy::Position) return {j, 0, slot};
  if (p.policy == DropPolicy::Weight) return by(p.scores[slot]);
  if (p.policy == DropPolicy::Priority) return by(p.scores[token]);
  const int64_t row = p.row_ids.empty() ? token : p.row_ids[token];
  const RandomWords random = random_words(p.seed, Purpose::Capacity, row, expert);
  return {0, std::uint64_t{random.words[1]} << 32 | random.words[0], slot};
}

template <class T> CapacityResults expected(const CapacityProblem<T>& p) {
  CapacityResults r{{}, std::vector<int64_t>(p.inverse.size(), -1), {}, {0}, {p.dropped}};
  const auto group_of = [&](int64_t slot) {
    int64_t group = 0;
    while (!p.group_offsets.empty() && slot / p.shape.slots >= p.group_offsets[group + 1]) ++group;
    return group;
  };
  for (int64_t e = 0; e < p.shape.experts; ++e) {
    std::map<int64_t, std::vector<int64_t>> groups;
    for (int64_t row = p.offsets[e]; row < p.offsets[e + 1]; ++row)
      groups[group_of(p.order[row])].push_back(p.order[row]);
    std::vector<int64_t> kept;
    for (auto& [group, slots] : groups) {
      std::sort(slots.begin(), slots.end(),
                [&](int64_t a, int64_t b) { return rank(p, e, a) < rank(p, e, b); });
      const auto count = std::min<int64_t>(p.capacity[group], slots.size());
      kept.insert(kept.end(), slots.begin(), slots.begin() + count);
      r.dropped[0] += static_cast<int64_t>(slots.size()) - count;
    }
    std::sort(kept.begin(), kept.end());
    for (const int64_t slot : kept) {
      r.inverse[slot] = static_cast<int64_t>(r.order.size());
      r.order.push_back(slot);
    }
    r.counts.push_back(static_cast<int64_t>(kept.size()));
    r.offsets.push_back(static_cast<int64_t>(r.order.size()));
  }
  r.order.resize(p.shape.rows, -1);
  return r;
}

class LimitCapacityKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }
  // In `pieces`, as threads would.
  template <class T> CapacityResults run(const CapacityProblem<T>& p, int64_t pieces) {
    return limit_capacity_steps<HostArray>(p, [&](const auto& params, int64_t count) {
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t begin = count * i / pieces, end = count * (i + 1) / pieces;
        if (begin < end) TORCH_ROUTERS_PICK_ISA(GetParam(), limit_capacity(params, begin, end));
      }
    });
  }
  template <class T> void compare(const CapacityProblem<T>& p) {
    for (const int64_t pieces : {1, 2, 5}) {
      const CapacityResults actual = run(p, pieces), sorted = expected(p);
      ASSERT_EQ(actual.order, sorted.order);
      ASSERT_EQ(actual.inverse, sorted.inverse);
      ASSERT_EQ(actual.counts, sorted.counts);
      ASSERT_EQ(actual.offsets, sorted.offsets);
      ASSERT_EQ(actual.dropped, sorted.dropped);
    }
  }
  template <class T> void compare_all() {
    const CapacityShape shapes[] = {{0, 0, 2, 3, 1},    {4, 0, 2, 3, 2},     {5, 6, 0, 3, 1},
                                    {20, 10, 2, 1, 1},  {30, 10, 3, 4, 1},   {160, 40, 4, 5, 1},
                                    {160, 40, 4, 5, 7}, {700, 2, 300, 2, 1}, {900, 300, 3, 4, 3}};
    for (const CapacityShape& shape : shapes)
      for (const auto policy :
           {DropPolicy::Position, DropPolicy::Weight, DropPolicy::Priority, DropPolicy::Random})
        for (const int64_t capacity : {0, 1, 2, 5, 17, 90, 1000})
          for (const char* scores : {"normal", "ties", "special"})
            compare(capacity_problem<T>(shape, policy, capacity, scores,
                                        static_cast<unsigned>(capacity)));
  }
};

TEST_P(LimitCapacityKernel, KeepsWhatASortPutsFirst) { compare_all<float>(); }
TEST_P(LimitCapacityKernel, KeepsWhatASortPutsFirstInDouble) { compare_all<double>(); }
TEST_P(LimitCapacityKernel, KeepsWhatASortPutsFirstInBFloat16) { compare_all<BFloat16>(); }
TEST_P(LimitCapacityKernel, KeepsWhatASortPutsFirstInFloat16) { compare_all<Float16>(); }

// Keys that differ in one digit only, whichever that is.
TEST_P(LimitCapacityKernel, EveryDigitOfAKeyCounts) {
  auto p = capacity_problem<double>({16, 16, 1, 1, 1}, DropPolicy::Priority, 3);
  for (int bit = 0; bit < 63; ++bit)
    for (int64_t t = 0; t < 16; ++t) {
      const std::uint64_t bits = 0x3ff0000000000000u ^ (std::uint64_t{t % 5 == 1} << bit);
      p.scores[t] = bit_cast<double>(bits);
      if (t == 15) compare(p);
    }
}

TEST_P(LimitCapacityKernel, RoomForAllIsACopy) {
  const auto p = capacity_problem<float>({100, 40, 2, 3, 1}, DropPolicy::Position, 80);
  const CapacityResults r = run(p, 3);
  EXPECT_EQ(r.order, p.order);
  EXPECT_EQ(r.inverse, p.inverse);
  EXPECT_EQ(r.offsets, p.offsets);
  EXPECT_EQ(r.dropped[0], p.dropped);
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, LimitCapacityKernel,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

}  // namespace
}  // namespace torch_routers
