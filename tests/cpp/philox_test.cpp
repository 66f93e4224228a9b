// Philox against the known answers that its authors publish (Random123, kat_vectors), and what a
// number depends on.
#include "common/philox.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <utility>
#include <vector>

namespace torch_routers {
namespace {

std::vector<std::uint32_t> words(const RandomWords& random) {
  return {random.words, random.words + 4};
}

TEST(Philox, KnownAnswers) {
  EXPECT_EQ(words(philox(0, {{0, 0, 0, 0}})),
            (std::vector<std::uint32_t>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(words(philox(~std::uint64_t{0}, {{kOnes, kOnes, kOnes, kOnes}})),
            (std::vector<std::uint32_t>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(words(philox(0x299f31d0a4093822, {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}})),
            (std::vector<std::uint32_t>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, EveryBitOfSeedRowAndColumnCounts) {
  std::set<std::vector<std::uint32_t>> seen;
  const auto add = [&](std::int64_t seed, std::int64_t row, std::int64_t column) {
    return seen.insert(words(random_words(seed, Purpose::Capacity, row, column))).second;
  };
  EXPECT_TRUE(add(0, 0, 0));
  for (int bit = 0; bit < 64; ++bit) {
    const auto value = static_cast<std::int64_t>(std::uint64_t{1} << bit);
    EXPECT_TRUE(add(value, 0, 0)) << bit;
    EXPECT_TRUE(add(0, value, 0)) << bit;
    EXPECT_TRUE(bit >= 32 || add(0, 0, value)) << bit;
  }
  EXPECT_EQ(words(random_words(3, Purpose::Capacity, -1, 7)),
            words(philox(3, {{0xffffffff, 0xffffffff, 7, 0}})));
}

}  // namespace
}  // namespace torch_routers
