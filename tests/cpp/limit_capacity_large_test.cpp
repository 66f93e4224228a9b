// Tokens whose slots, scores and rows lie beyond 2^31 elements, in a group of their own: the same
// plan as of those tokens alone.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "limit_capacity/limit_capacity_kernel.h"
#include "sparse.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int64_t kSlots = 8, kLast = 10, kRows = kLast * kSlots * 3 / 4, kCapacity = 23;

// New order and inverse of the last tokens, counted from their first row and slot; none if there is
// no room.
std::vector<int64_t> plan_of_the_last(int64_t tokens) {
  const int64_t slots = tokens * kSlots, first = tokens - kLast, start = first * kSlots;
  const Sparse<int64_t> order(slots), inverse(slots), new_order(slots), new_inverse(slots),
      new_rows(slots);
  const Sparse<std::uint64_t> keys(slots);
  const Sparse<float> weights(slots);
  if (!(order && inverse && new_order && new_inverse && new_rows && keys && weights)) return {};
  // The slots before these all have the row of their number, which is looked at nowhere.
  for (int64_t slot = start, row = start; slot < slots; ++slot) {
    weights.data()[slot] = std::sin(static_cast<float>(slot - start));
    inverse.data()[slot] = slot % 4 ? row : -1;
    if (slot % 4) order.data()[row++] = slot;
  }
  const int64_t offsets[] = {0, start + kRows}, group_offsets[] = {0, first, tokens},
                capacity[] = {std::numeric_limits<int64_t>::max(), kCapacity}, dropped = 5;
  Segment segments[2] = {{0, start, start, 0, 0, 0}, {}};
  int64_t new_counts[1], new_offsets[2], new_dropped;

  const CapacityShape shape{slots, tokens, kSlots, 1, 2};
  const CapacitySelect<float> select{
      shape,         order.data(),       offsets,     capacity, weights.data(), nullptr, nullptr,
      group_offsets, DropPolicy::Weight, keys.data(), segments};
  limit_capacity_cpu(select, 1, 2);
  limit_capacity_cpu(
      CapacityPlace{shape, &dropped, segments, new_counts, new_offsets, &new_dropped}, 0, 1);
  limit_capacity_cpu(
      CapacityMove{shape, order.data(), keys.data(), segments, new_order.data(), new_rows.data()},
      1, 2);
  limit_capacity_cpu(CapacityRenumber{shape, inverse.data(), new_rows.data(), segments,
                                      new_inverse.data(), new_order.data()},
                     start, slots);

  EXPECT_EQ(new_counts[0], start + kCapacity);
  EXPECT_EQ(new_offsets[1], start + kCapacity);
  EXPECT_EQ(new_dropped, dropped + kRows - kCapacity);
  std::vector<int64_t> plan;
  for (const auto* values : {&new_order, &new_inverse})
    for (int64_t i = start; i < slots; ++i) {
      const int64_t value = values->data()[i];
      plan.push_back(value < 0 ? value : value - start);
    }
  return plan;
}

TEST(LimitCapacityLarge, OffsetsBeyond32Bits) {
  constexpr int64_t kTokens = (int64_t{1} << 31) / kSlots + 2 * kLast;
  const auto large = plan_of_the_last(kTokens);
  if (large.empty()) GTEST_SKIP() << "this machine maps no memory that it does not have";
  EXPECT_EQ(large, plan_of_the_last(kLast));
}

}  // namespace
}  // namespace torch_routers
