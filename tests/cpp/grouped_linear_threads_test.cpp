// Grouped products on several threads: for ThreadSanitizer, and to the same bits as on one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "grouped_linear/grouped_linear_kernel.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int64_t kGroups = 3, kOutputs = 75, kInputs = 53, kRows = 20;
constexpr int64_t kOffsets[kGroups + 1] = {0, 7, 7, kRows};

// y, followed by the outer products.
std::vector<float> run(bool transposed, int threads) {
  constexpr int64_t kWeight = kGroups * kOutputs * kInputs;
  std::vector<float> x(kRows * kInputs), weight(kWeight), results(kRows * kOutputs + kWeight);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = std::cos(static_cast<float>(i));
  float *y = results.data(), *result = y + kRows * kOutputs;
  const GroupedLinear<float> linear{kOutputs,
                                    kInputs,
                                    kOffsets,
                                    x.data(),
                                    weight.data(),
                                    nullptr,
                                    y,
                                    kInputs,
                                    kOutputs * kInputs,
                                    transposed ? 1 : kInputs,
                                    transposed ? kOutputs : 1};
  const GroupedOuter<float> outer{kOutputs, kInputs, kOffsets, y,
                                  x.data(), result,  kOutputs, kInputs};
  // Neighbouring outputs on different threads.
  const auto on_threads = [&](const auto& params) {
    run_on_threads(threads, kGroups * kOutputs, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin / kOutputs; g * kOutputs < end; ++g)
        grouped_cpu(params, g, std::max<int64_t>(begin - g * kOutputs, 0),
                    std::min(end - g * kOutputs, kOutputs));
    });
  };
  on_threads(linear);
  on_threads(outer);
  return results;
}

TEST(GroupedLinearThreads, GiveTheSameBits) {
  for (const bool transposed : {false, true}) {
    const auto expected = run(transposed, 1);
    for (const int threads : {2, 3, 4, 8}) EXPECT_EQ(run(transposed, threads), expected) << threads;
  }
}

}  // namespace
}  // namespace torch_routers
