// The CUDA kernels of lora_mix against loops, in every type: exactly, as the inputs are small
// integers, with which any order of summation gives the same result.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "device_array.h"
#include "lora_mix/lora_mix_kernel.h"

namespace torch_routers {
namespace {

using std::int64_t;

struct LoraCase {
  int64_t tokens, slots, features;
  std::vector<int64_t> ranks;  // of each expert
  int64_t spare = 0;           // rows without a token, of each expert and behind them all
  double empty = 0;            // share of the slots that have no row
  int64_t spare_ranks = 0;     // max_rank - the largest rank
};

std::ostream& operator<<(std::ostream& out, const LoraCase& c) {
  out << c.tokens << "x" << c.slots << "_features_" << c.features << "_ranks";
  for (const int64_t rank : c.ranks) out << "_" << rank;
  return out << "_spare_" << c.spare << "_" << c.spare_ranks << "_empty_"
             << static_cast<int>(100 * c.empty);
}

template <class T> struct LoraProblem {
  int64_t tokens, slots, experts, rows, features, max_rank;
  std::vector<int64_t> order, inverse, offsets{0}, ranks{0};
  std::vector<T> x, weight, z;  // NaN where nobody may look

  explicit LoraProblem(const LoraCase& c)
      : tokens(c.tokens),
        slots(c.slots),
        experts(static_cast<int64_t>(c.ranks.size())),
        features(c.features),
        max_rank(c.spare_ranks),
        inverse(tokens * slots, -1) {
    std::mt19937 random(static_cast<unsigned>(tokens + 7 * slots + features));
    std::vector<std::vector<int64_t>> slots_of(experts);
    for (int64_t slot = 0; experts && slot < tokens * slots; ++slot)
      if (random() >= c.empty * static_cast<double>(random.max())) {
        const auto e = static_cast<int64_t>(random() % experts);
        slots_of[e == 1 ? 0 : e].push_back(slot);  // expert 1 has no slots
      }
    for (int64_t e = 0; e < experts; ++e) {
      max_rank = std::max(max_rank, c.ranks[e] + c.spare_ranks);
      ranks.push_back(ranks.back() + c.ranks[e]);
      for (const int64_t slot : slots_of[e]) {
        inverse[slot] = static_cast<int64_t>(order.size());
        order.push_back(slot);
      }
      order.insert(order.end(), c.spare, -1);
      offsets.push_back(static_cast<int64_t>(order.size()));
    }
    order.insert(order.end(), c.spare, -1);
    rows = static_cast<int64_t>(order.size());

    const auto draw = [&](int64_t size) {
      std::vector<T> values(size);
      for (T& value : values)
        store(&value, static_cast<Compute<T>>(static_cast<int>(random() % 9) - 4));
      return values;
    };
    x = draw(tokens * features);
    weight = draw(ranks.back() * features);
    z = draw(rows * max_rank);
    const auto nan = static_cast<Compute<T>>(__builtin_nan(""));
    for (int64_t t = 0; t < tokens; ++t)
      if (std::all_of(inverse.begin() + t * slots, inverse.begin() + (t + 1) * slots,
                      [](int64_t row) { return row < 0; }))
        for (int64_t h = 0; h < features; ++h) store(&x[t * features + h], nan);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = order[r] < 0 ? 0 : rank(expert_of(r)); j < max_rank; ++j)
        store(&z[r * max_rank + j], nan);
  }

  // Offsets count as numbers in [0, rows], the first as 0; slots and rows that cannot be, as none.
  int64_t offset(int64_t e) const { return e ? std::clamp<int64_t>(offsets[e], 0, rows) : 0; }
  int64_t rank(int64_t e) const { return ranks[e + 1] - ranks[e]; }
  int64_t expert_of(int64_t r) const {
    for (int64_t e = 0; e < experts; ++e)
      if (offset(e) <= r && r < offset(e + 1)) return e;
    return -1;
  }
  int64_t token_of(int64_t r) const {
    return 0 <= order[r] && order[r] < tokens * slots ? order[r] / slots : -1;
  }
  Compute<T> x_at(int64_t t, int64_t h) const { return load(x[t * features + h]); }
  Compute<T> z_at(int64_t r, int64_t j) const { return load(z[r * max_rank + j]); }
  Compute<T> weight_at(int64_t e, int64_t j, int64_t h) const {
    return load(weight[(ranks[e] + j) * features + h]);
  }

  // What lora_mix_kernel.h says, in loops.
  std::vector<Compute<T>> shrink() const {
    std::vector<Compute<T>> result(rows * max_rank);
    for (int64_t r = 0; r < rows; ++r)
      if (const int64_t e = expert_of(r), t = token_of(r); e >= 0 && t >= 0)
        for (int64_t j = 0; j < rank(e); ++j)
          for (int64_t h = 0; h < features; ++h)
            result[r * max_rank + j] += weight_at(e, j, h) * x_at(t, h);
    return result;
  }
  std::vector<Compute<T>> expand() const {
    std::vector<Compute<T>> result(tokens * features);
    for (int64_t slot = 0; slot < tokens * slots; ++slot) {
      const int64_t r = inverse[slot], e = 0 <= r && r < rows ? expert_of(r) : -1;
      for (int64_t j = 0; e >= 0 && j < rank(e); ++j)
        for (int64_t h = 0; h < features; ++h)
          result[slot / slots * features + h] += z_at(r, j) * weight_at(e, j, h);
    }
    return result;
  }
  std::vector<Compute<T>> outer() const {
    std::vector<Compute<T>> result(ranks.back() * features);
    for (int64_t r = 0; r < rows; ++r)
      if (const int64_t e = expert_of(r), t = token_of(r); e >= 0 && t >= 0)
        for (int64_t j = 0; j < rank(e); ++j)
          for (int64_t h = 0; h < features; ++h)
            result[(ranks[e] + j) * features + h] += z_at(r, j) * x_at(t, h);
    return result;
  }
};

template <class T> struct LoraResults {
  std::vector<T> z, y, result;
};

template <class T> std::vector<T> padded(std::vector<T> values, int64_t shift) {
  values.insert(values.begin(), shift, T{});
  return values;
}

// Arrays of numbers begin `shift` elements past a multiple of 16 bytes.
template <class T> LoraResults<T> run(const LoraProblem<T>& p, int64_t shift) {
  const DeviceArray<int64_t> order(p.order), inverse(p.inverse), offsets(p.offsets), ranks(p.ranks);
  const LoraRows rows{p.tokens,   p.slots,      p.experts,      p.rows,         p.features,
                      p.max_rank, order.data(), inverse.data(), offsets.data(), ranks.data()};
  const DeviceArray<T> x(padded(p.x, shift)), weight(padded(p.weight, shift)),
      z(padded(p.z, shift));
  const DeviceArray<T> new_z(p.z.size() + shift), y(p.x.size() + shift),
      result(p.weight.size() + shift);
  lora_mix_cuda(LoraShrink<T>{rows, x.data() + shift, weight.data() + shift, new_z.data() + shift},
                nullptr);
  lora_mix_cuda(LoraExpand<T>{rows, z.data() + shift, weight.data() + shift, y.data() + shift},
                nullptr);
  lora_mix_cuda(LoraOuter<T>{rows, z.data() + shift, x.data() + shift, result.data() + shift},
                nullptr);
  const auto read = [&](const DeviceArray<T>& array) {
    const std::vector<T> all = array.to_host();
    return std::vector<T>(all.begin() + shift, all.end());
  };
  return {read(new_z), read(y), read(result)};
}

// Of bits, except that all NaN are equal and 0 is -0.
template <class T>
void expect_equal(const char* what, const std::vector<T>& actual,
                  const std::vector<Compute<T>>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    T rounded;
    store(&rounded, expected[i]);
    const Compute<T> a = load(actual[i]), b = load(rounded);
    if (a != b && !(a != a && b != b)) {
      ADD_FAILURE() << what << " at " << i << ": " << a << ", expected " << b;
      return;
    }
  }
}

template <class T> void expect_equals_loops(const LoraProblem<T>& p, int64_t shift = 0) {
  SCOPED_TRACE(testing::Message() << sizeof(T) << " bytes, shift " << shift);
  const LoraResults<T> actual = run(p, shift);
  expect_equal("z", actual.z, p.shrink());
  expect_equal("y", actual.y, p.expand());
  expect_equal("result", actual.result, p.outer());
}

class LoraMixCuda : public testing::TestWithParam<LoraCase> {
 protected:
  template <class T> void compare() { expect_equals_loops(LoraProblem<T>(GetParam())); }
};
TEST_P(LoraMixCuda, Float) { compare<float>(); }
TEST_P(LoraMixCuda, Double) { compare<double>(); }
TEST_P(LoraMixCuda, BFloat16) { compare<BFloat16>(); }
TEST_P(LoraMixCuda, Float16) { compare<Float16>(); }

INSTANTIATE_TEST_SUITE_P(
    Cases, LoraMixCuda,
    testing::Values(
        // Nothing of something: tokens, slots, features, experts, ranks, rows.
        LoraCase{0, 2, 8, {2, 3}, 2}, LoraCase{3, 0, 8, {2, 1}, 1}, LoraCase{3, 2, 0, {2, 1}},
        LoraCase{3, 2, 8, {}, 2}, LoraCase{3, 2, 8, {0, 0}}, LoraCase{3, 2, 8, {0, 0}, 1, 0, 3},
        LoraCase{4, 2, 8, {3, 2}, 0, 1}, LoraCase{1, 1, 1, {1}},
        // Tails: of the features, of the ranks.
        LoraCase{5, 2, 24, {1, 2, 4}, 1, .2, 1}, LoraCase{9, 3, 33, {3, 2, 0, 17, 5}, 2, .3},
        LoraCase{4, 2, 264, {8, 1, 16}}, LoraCase{3, 2, 136, {4, 2, 33}, 1, .1, 2},
        // Several tiles of rows, blocks of tokens, batches of slots, turns of the warps.
        LoraCase{70, 1, 16, {5}}, LoraCase{90, 2, 40, {2, 1, 9, 4}, 3, .1},
        LoraCase{3, 40, 16, {3, 1, 2}, 0, .2}, LoraCase{160, 1, 24, {3}, 1}),
    testing::PrintToStringParamName());

TEST(LoraMixCuda, RowsThatBeginAnywhere) {
  for (const int64_t shift : {1, 3}) {
    expect_equals_loops(LoraProblem<float>({5, 2, 40, {2, 3, 4}, 1, .1}), shift);
    expect_equals_loops(LoraProblem<BFloat16>({5, 2, 40, {2, 3, 4}, 1, .1}), shift);
  }
}

// 2^24 + 1 is no float: the sum is that of one order alone, by slot and then by rank.
TEST(LoraMixCuda, ExpandAddsInTheOrderOfSlots) {
  LoraProblem<float> p({6, 5, 8, {3, 2, 4, 1}, 1, .1});
  std::mt19937 random(1);
  for (float& value : p.z)
    if (value == value)
      value = (random() % 2 ? 1.f : -1.f) * (random() % 2 ? 1.f : static_cast<float>(1 << 24));
  std::fill(p.weight.begin(), p.weight.end(), 1.f);
  expect_equal("y", run(p, 0).y, p.expand());
}

// The simulated threads run in another order each time.
TEST(LoraMixCuda, NoOrderOfThreadsChangesABit) {
  LoraProblem<float> p({50, 2, 72, {3, 5, 2}, 1, .1});
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (auto* values : {&p.x, &p.weight, &p.z})
    for (float& value : *values) value = normal(random);
  const LoraResults<float> once = run(p, 0), again = run(p, 0);
  EXPECT_EQ(once.z, again.z);
  EXPECT_EQ(once.y, again.y);
  EXPECT_EQ(once.result, again.result);
}

// The operator looks at plans on the CPU only. The tools watch for accesses out of bounds.
TEST(LoraMixCuda, PlansThatMakeNoSense) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const LoraProblem<float> sound({6, 2, 40, {2, 1, 3}, 3, .1});
  LoraProblem<float> p = sound;
  const std::vector<int64_t> rows{-2, p.rows, int64_t{1} << 40, kMost, -kMost, 0};
  const std::vector<int64_t> slots{-2, 12, kMost, -kMost, 3};
  for (std::size_t i = 0; i < rows.size(); ++i) p.inverse[2 * i + 1] = rows[i];
  for (std::size_t i = 0; i < slots.size(); ++i) p.order[2 * i + 1] = slots[i];
  expect_equals_loops(p);
  p = sound;
  p.offsets.front() = -kMost;
  p.offsets.back() = kMost;
  expect_equals_loops(p);
  std::fill(p.offsets.begin() + 1, p.offsets.end(), int64_t{1} << 40);
  expect_equals_loops(p);
  std::fill(p.offsets.begin(), p.offsets.end(), kMost);
  expect_equals_loops(p);
}

TEST(LoraMixCuda, TooLargeAGridIsAnError) {
  LoraShrink<float> shrink{};
  shrink.rows = int64_t{1} << 40;
  shrink.max_rank = 1;
  EXPECT_THROW(lora_mix_cuda(shrink, nullptr), std::runtime_error);
}

}  // namespace
}  // namespace torch_routers
