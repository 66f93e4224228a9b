// Selection of the largest keys, by each of its ways, against a stable sort.
#include "common/select.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace torch_routers {
namespace {

using std::int64_t;

template <class Key> class Select : public testing::Test {};
using Keys = testing::Types<std::int32_t, int64_t>;
TYPED_TEST_SUITE(Select, Keys);

// Keys of about so many values, the smallest and largest of all integers among them.
template <class Key> std::vector<Key> draw(int64_t size, int64_t distinct, unsigned seed) {
  using Limits = std::numeric_limits<Key>;
  std::mt19937_64 random(seed);
  std::vector<Key> values(distinct), keys(size);
  for (Key& value : values) value = static_cast<Key>(random());
  values[0] = Limits::max();
  if (distinct > 1) values[1] = Limits::min() + 1;  // the smallest is no key
  if (distinct > 3) values[2] = 0, values[3] = -1;
  for (Key& key : keys) key = values[random() % distinct];
  return keys;
}

template <class Key> std::vector<int64_t> sorted(const std::vector<Key>& keys, int64_t slots) {
  std::vector<int64_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
  order.resize(slots);
  return order;
}

// Calls check(keys, slots) for rows of many sizes.
template <class Key, class Check> void for_many_rows(const Check& check) {
  for (const int64_t size :
       {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 256, 257, 1000, 2000})
    for (const int64_t distinct : {1, 2, 5, 100, 1000000}) {
      const auto keys = draw<Key>(size, std::min(distinct, 4 * size), size + distinct);
      for (const int64_t slots : {1, 2, 8, 9, 16, 17, 32, 33, 100, 1999, 2000})
        if (slots <= size) check(keys, slots);
      check(keys, size);
    }
}

TYPED_TEST(Select, IsAStableSort) {
  for_many_rows<TypeParam>([](std::vector<TypeParam> keys, int64_t slots) {
    const auto expected = sorted(keys, slots);
    const auto size = static_cast<int64_t>(keys.size());
    keys.resize(size + kKeyPadding, std::numeric_limits<TypeParam>::max());
    std::vector<int64_t> best(slots, -7);
    select_keys(keys.data(), size, slots, best.data());
    EXPECT_EQ(best, expected) << size << " " << slots;
  });
}

TYPED_TEST(Select, ByRadixAlone) {
  for_many_rows<TypeParam>([](const std::vector<TypeParam>& keys, int64_t slots) {
    std::vector<int64_t> best(slots, -7);
    select::by_radix(keys.data(), static_cast<int64_t>(keys.size()), slots, best.data());
    EXPECT_EQ(best, sorted(keys, slots)) << keys.size() << " " << slots;
  });
}

TYPED_TEST(Select, ByRankGivesUpOnManyEqualKeys) {
  std::vector<TypeParam> keys(200 + kKeyPadding, 5);
  std::fill(keys.end() - kKeyPadding, keys.end(), std::numeric_limits<TypeParam>::min());
  std::vector<int64_t> best(8);
  EXPECT_FALSE(select::by_rank<16>(keys.data(), 200, 8, best.data()));
  for (int i = 0; i < 200; ++i) keys[i] = static_cast<TypeParam>(i);
  EXPECT_TRUE(select::by_rank<16>(keys.data(), 200, 8, best.data()));
  EXPECT_EQ(best, (std::vector<int64_t>{199, 198, 197, 196, 195, 194, 193, 192}));
}

TYPED_TEST(Select, ExcludedKeysAreNotChosen) {
  constexpr auto kNone = std::numeric_limits<TypeParam>::min();
  for (const int64_t slots : {2, 20, 40}) {
    std::vector<TypeParam> keys(300, kNone);
    std::vector<int64_t> best(slots), expected(slots);
    for (int64_t j = 0; j < slots; ++j) keys[7 * j] = kNone + 1, expected[j] = 7 * j;
    keys.resize(300 + kKeyPadding);
    select_keys(keys.data(), 300, slots, best.data());
    EXPECT_EQ(best, expected);
  }
}

TEST(SelectKeys, SignedOrderAsRankKeysDo) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> ascending = {-kInfinity, -1, 0, 1e-40f, 1, kInfinity};
  EXPECT_GT(signed_key(ascending[0]), kNoKey<float>);
  for (std::size_t i = 1; i < ascending.size(); ++i)
    EXPECT_LT(signed_key(ascending[i - 1]), signed_key(ascending[i])) << i;
  EXPECT_EQ(signed_key(0.0f), signed_key(-0.0f));
  EXPECT_GT(signed_key(std::numeric_limits<float>::quiet_NaN()), signed_key(kInfinity));
}

}  // namespace
}  // namespace torch_routers
