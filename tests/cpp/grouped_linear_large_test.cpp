// A group whose rows, weight and products lie beyond 2^31 elements: the same results as of that
// group alone.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "grouped_linear/grouped_linear_kernel.h"
#include "sparse.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int64_t kOutputs = 65, kInputs = 70, kRows = 10;

// y and the outer products of the last group, whose rows are the last; none if there is no room.
std::vector<float> results_of_the_last(int64_t groups, int64_t rows, bool transposed) {
  const int64_t group = groups - 1, first = rows - kRows;
  const Sparse<int64_t> offsets(groups + 1);
  const Sparse<float> x(rows * kInputs), weight(groups * kOutputs * kInputs),
      bias(groups * kOutputs), y(rows * kOutputs), result(groups * kOutputs * kInputs);
  if (!(offsets && x && weight && bias && y && result)) return {};
  offsets.data()[group] = first;
  offsets.data()[groups] = rows;
  const auto fill = [](const Sparse<float>& values, int64_t from, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      values.data()[from + i] = std::sin(static_cast<float>(i + count));
  };
  fill(x, first * kInputs, kRows * kInputs);
  fill(weight, group * kOutputs * kInputs, kOutputs * kInputs);
  fill(bias, group * kOutputs, kOutputs);

  const GroupedLinear<float> linear{kOutputs,
                                    kInputs,
                                    offsets.data(),
                                    x.data(),
                                    weight.data(),
                                    bias.data(),
                                    y.data(),
                                    kInputs,
                                    kOutputs * kInputs,
                                    transposed ? 1 : kInputs,
                                    transposed ? kOutputs : 1};
  grouped_cpu(linear, group, 0, kOutputs);
  grouped_cpu(GroupedOuter<float>{kOutputs, kInputs, offsets.data(), y.data(), x.data(),
                                  result.data(), kOutputs, kInputs},
              group, 0, kOutputs);

  const float *rows_of_y = y.data() + first * kOutputs,
              *products = result.data() + group * kOutputs * kInputs;
  std::vector<float> results(rows_of_y, rows_of_y + kRows * kOutputs);
  results.insert(results.end(), products, products + kOutputs * kInputs);
  return results;
}

TEST(GroupedLinearLarge, OffsetsBeyond32Bits) {
  constexpr int64_t kMany = int64_t{1} << 31, kGroups = kMany / (kOutputs * kInputs) + 2;
  for (const bool transposed : {false, true}) {
    const auto large = results_of_the_last(kGroups, kMany / kOutputs + 2 * kRows, transposed);
    if (large.empty()) GTEST_SKIP() << "this machine maps no memory that it does not have";
    EXPECT_EQ(large, results_of_the_last(1, kRows, transposed));
  }
}

}  // namespace
}  // namespace torch_routers
