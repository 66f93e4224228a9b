// The kernels of grouped_linear on every instruction set: equal to loops in double, equal to the bit
// among each other, and nothing read or written that should not be. Memory is exact, so that
// sanitizers see each slip.
#include "grouped_linear/grouped_linear_kernel.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "numbers.h"

namespace torch_routers {
namespace {

using std::int64_t;

// A matrix whose rows have gaps, filled with NaN, between them, but not behind the last one.
template <class T> std::vector<T> with_gaps(const std::vector<T>& dense, int64_t rows, int64_t size,
                                            int64_t stride) {
  std::vector<T> result(rows ? (rows - 1) * stride + size : 0, number<T>(std::nan("")));
  for (int64_t n = 0; n < rows; ++n)
    std::copy_n(dense.begin() + n * size, size, result.begin() + n * stride);
  return result;
}

template <class T> struct Problem {
  std::vector<int64_t> offsets;
  int64_t outputs, inputs, tail = 2;  // rows that belong to no group

  int64_t groups() const { return int64_t(offsets.size()) - 1; }
  int64_t rows() const { return offsets.back() + tail; }
  std::vector<T> x() const {
    auto values = random_numbers<T>(rows() * inputs, 1);
    std::fill(values.end() - tail * inputs, values.end(), number<T>(std::nan("")));
    return values;
  }
  std::vector<T> weight() const { return random_numbers<T>(groups() * outputs * inputs, 2); }
  std::vector<T> bias() const { return random_numbers<T>(groups() * outputs, 3); }
};

template <class T> class GroupedLinearKernel : public testing::Test {
 protected:
  static std::vector<Isa> isas() {
    std::vector<Isa> result;
    for (const Isa candidate : {Isa::Default, Isa::Avx2, Isa::Avx512})
      if (candidate <= isa()) result.push_back(candidate);
    return result;
  }

  // Outputs in ranges of `step`, as threads would share them.
  static std::vector<T> linear(Isa isa, const Problem<T>& q, bool transposed, bool with_bias,
                               int64_t step = 1 << 20) {
    const int64_t gap = 3;
    const auto x = with_gaps(q.x(), q.rows(), q.inputs, q.inputs + gap);
    const auto dense = q.weight();
    auto weight = dense;
    for (int64_t g = 0; transposed && g < q.groups(); ++g)
      for (int64_t o = 0; o < q.outputs; ++o)
        for (int64_t i = 0; i < q.inputs; ++i)
          weight[(g * q.inputs + i) * q.outputs + o] = dense[(g * q.outputs + o) * q.inputs + i];
    const auto bias = with_bias ? q.bias() : std::vector<T>{};
    std::vector<T> y(q.rows() * q.outputs, number<T>(7));
    const GroupedLinear<T> params{q.outputs,
                                  q.inputs,
                                  q.offsets.data(),
                                  x.data(),
                                  weight.data(),
                                  with_bias ? bias.data() : nullptr,
                                  y.data(),
                                  q.inputs + gap,
                                  q.outputs * q.inputs,
                                  transposed ? 1 : q.inputs,
                                  transposed ? q.outputs : 1};
    for (int64_t g = 0; g < q.groups(); ++g)
      for (int64_t begin = 0; begin < q.outputs; begin += step)
        TORCH_ROUTERS_PICK_ISA(isa, grouped(params, g, begin, std::min(begin + step, q.outputs)));
    return y;
  }

  static std::vector<T> outer(Isa isa, const Problem<T>& q, int64_t step = 1 << 20) {
    const auto y = with_gaps(random_numbers<T>(q.rows() * q.outputs, 4), q.rows(), q.outputs,
                             q.outputs + 1),
               x = with_gaps(q.x(), q.rows(), q.inputs, q.inputs + 5);
    std::vector<T> result(q.groups() * q.outputs * q.inputs, number<T>(7));
    const GroupedOuter<T> params{q.outputs, q.inputs,      q.offsets.data(), y.data(),
                                 x.data(),  result.data(), q.outputs + 1,    q.inputs + 5};
    for (int64_t g = 0; g < q.groups(); ++g)
      for (int64_t begin = 0; begin < q.outputs; begin += step)
        TORCH_ROUTERS_PICK_ISA(isa, grouped(params, g, begin, std::min(begin + step, q.outputs)));
    return result;
  }
};

using Types = testing::Types<float, double, BFloat16, Float16>;
TYPED_TEST_SUITE(GroupedLinearKernel, Types);

// Around every width of vector, block and tile.
const std::vector<int64_t> kSizes{1, 2, 3, 5, 16, 17, 67};

template <class Check> void for_each_size(const Check& check) {
  for (const int64_t outputs : kSizes)
    for (const int64_t inputs : kSizes) check({0, 0, 1, 3, 10, 10}, outputs, inputs);
  check({0, 9}, 3, 1200);  // more terms than one running sum takes
  check({0, 1100, 1101}, 5, 18);
}

TYPED_TEST(GroupedLinearKernel, EqualsTheLoop) {
  using T = TypeParam;
  const Isa isa = torch_routers::isa();
  for_each_size([&](std::vector<int64_t> offsets, int64_t outputs, int64_t inputs) {
    const Problem<T> q{offsets, outputs, inputs};
    const auto x = q.x(), weight = q.weight(), bias = q.bias();
    for (const bool transposed : {false, true})
      for (const bool with_bias : {false, true}) {
        const auto y = this->linear(isa, q, transposed, with_bias);
        for (int64_t g = 0; g < q.groups(); ++g)
          for (int64_t n = offsets[g]; n < offsets[g + 1]; ++n)
            for (int64_t o = 0; o < outputs; ++o) {
              double expected = with_bias ? load(bias[g * outputs + o]) : 0,
                     size = std::abs(expected);
              for (int64_t i = 0; i < inputs; ++i) {
                const double term = double(load(weight[(g * outputs + o) * inputs + i])) *
                                    double(load(x[n * inputs + i]));
                expected += term;
                size += std::abs(term);
              }
              const double of_sums = rounding<Compute<T>>() * double(inputs + 2) * size;
              ASSERT_NEAR(
                  load(y[n * outputs + o]), expected,
                  of_sums + 1.01 * rounding<T>() * std::abs(expected) + 1e-7 * (sizeof(T) < 4))
                  << outputs << "x" << inputs << " transposed " << transposed;
            }
        for (int64_t i = q.offsets.back() * outputs; i < q.rows() * outputs; ++i)
          ASSERT_EQ(load(y[i]), 7) << "a row of no group was written";
      }
  });
}

TYPED_TEST(GroupedLinearKernel, OuterEqualsTheLoop) {
  using T = TypeParam;
  for_each_size([&](std::vector<int64_t> offsets, int64_t outputs, int64_t inputs) {
    const Problem<T> q{offsets, outputs, inputs};
    const auto y = random_numbers<T>(q.rows() * outputs, 4), x = q.x();
    const auto result = this->outer(isa(), q);
    for (int64_t g = 0; g < q.groups(); ++g)
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t i = 0; i < inputs; ++i) {
          double expected = 0, size = 0;
          for (int64_t n = offsets[g]; n < offsets[g + 1]; ++n) {
            const double term = double(load(y[n * outputs + o])) * double(load(x[n * inputs + i]));
            expected += term;
            size += std::abs(term);
          }
          const double of_sums =
              rounding<Compute<T>>() * double(offsets[g + 1] - offsets[g]) * size;
          ASSERT_NEAR(load(result[(g * outputs + o) * inputs + i]), expected,
                      of_sums + 1.01 * rounding<T>() * std::abs(expected) + 1e-7 * (sizeof(T) < 4));
        }
  });
}

TYPED_TEST(GroupedLinearKernel, SameBitsOnEveryInstructionSetAndForEveryShare) {
  using T = TypeParam;
  for_each_size([&](std::vector<int64_t> offsets, int64_t outputs, int64_t inputs) {
    const Problem<T> q{offsets, outputs, inputs};
    for (const bool transposed : {false, true}) {
      const auto expected = bits(this->linear(Isa::Default, q, transposed, true));
      for (const Isa isa : this->isas())
        for (const int64_t step : {1, 16, 1 << 20})
          ASSERT_EQ(bits(this->linear(isa, q, transposed, true, step)), expected) << name(isa);
    }
    const auto expected = bits(this->outer(Isa::Default, q));
    for (const Isa isa : this->isas())
      for (const int64_t step : {1, 16, 1 << 20})
        ASSERT_EQ(bits(this->outer(isa, q, step)), expected) << name(isa);
  });
}

TYPED_TEST(GroupedLinearKernel, ARowDoesNotDependOnTheOthers) {
  using T = TypeParam;
  for (const bool transposed : {false, true})
    for (int64_t rows = 1; rows < 9; ++rows) {
      const Problem<T> alone{{0, 1}, 37, 53, 0}, many{{0, rows}, 37, 53, 0};
      const auto one = this->linear(isa(), alone, transposed, true);
      auto first = this->linear(isa(), many, transposed, true);
      first.resize(37);
      EXPECT_EQ(bits(first), bits(one));
    }
}

// x and the weight, which have no elements, are at null, and have the strides that torch gives them.
TYPED_TEST(GroupedLinearKernel, WithoutInputsThereIsTheBias) {
  using T = TypeParam;
  const int64_t offsets[] = {0, 1, 3};
  const std::vector<T> bias = random_numbers<T>(10, 1);
  for (const Isa isa : this->isas())
    for (const bool transposed : {false, true}) {
      std::vector<T> y(15, number<T>(7)), expected = bias;
      expected.insert(expected.end(), bias.begin() + 5, bias.end());
      const GroupedLinear<T> params{5,        0, offsets, nullptr, nullptr,           bias.data(),
                                    y.data(), 1, 5,       1,       transposed ? 5 : 1};
      const GroupedOuter<T> outer{5, 0, offsets, y.data(), nullptr, nullptr, 5, 1};
      for (int64_t g = 0; g < 2; ++g) {
        TORCH_ROUTERS_PICK_ISA(isa, grouped(params, g, 0, 5));
        TORCH_ROUTERS_PICK_ISA(isa, grouped(outer, g, 0, 5));
      }
      EXPECT_EQ(bits(y), bits(expected));
    }
}

// Each special number of a narrow type, through a product with 1: as load() and store() have it.
TYPED_TEST(GroupedLinearKernel, KeepsSpecialNumbers) {
  using T = TypeParam;
  std::vector<T> x;
  for (const double value : {0.0, 1.0, -2.5, 65504.0, 1e6, 3e-8, 6e-8, -1e-5, 0.1, 1e38, 1e-40})
    x.push_back(number<T>(value));
  x.push_back(number<T>(std::numeric_limits<double>::infinity()));
  x.push_back(number<T>(std::nan("")));
  const int64_t rows = x.size(), offsets[] = {0, rows};
  const std::vector<T> one(1, number<T>(1));
  for (const Isa isa : this->isas()) {
    std::vector<T> y(rows, number<T>(7)), wide(rows * 16, number<T>(7));
    const GroupedLinear<T> params{1,        1, offsets, x.data(), one.data(), nullptr,
                                  y.data(), 1, 1,       1,        1};
    TORCH_ROUTERS_PICK_ISA(isa, grouped(params, 0, 0, 1));
    const std::vector<T> ones(16, number<T>(1));
    const GroupedLinear<T> whole{16,          1, offsets, x.data(), ones.data(), nullptr,
                                 wide.data(), 1, 16,      1,        16};
    TORCH_ROUTERS_PICK_ISA(isa, grouped(whole, 0, 0, 16));
    for (int64_t n = 0; n < rows; ++n) {
      const auto same = [&](T actual) {
        return load(actual) == load(x[n]) ||
               (load(x[n]) != load(x[n]) && load(actual) != load(actual));
      };
      EXPECT_TRUE(same(y[n])) << n << " " << load(x[n]) << " " << load(y[n]);
      for (int64_t o = 0; o < 16; ++o) EXPECT_TRUE(same(wide[n * 16 + o])) << n;
    }
  }
}

}  // namespace
}  // namespace torch_routers
