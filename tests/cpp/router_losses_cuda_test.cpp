// The CUDA kernels of the router losses against the CPU kernels.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "device_array.h"
#include "host_array.h"
#include "router_losses/router_losses_kernel.h"

namespace torch_routers {
namespace {

using std::int64_t;
template <class T> using Values = std::vector<T>;

struct Case {
  std::string name;
  Values<int64_t> group_tokens;
  int64_t experts;
};
std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

struct Options {
  bool balance = true, z = true, importance = true;
  bool switch_convention = false, per_group = false, unbiased = false;
};

template <class T> struct Inputs {
  RouterLossesShape shape;
  Values<T> lse, score_sums;
  Values<int64_t> counts, group_tokens;

  explicit Inputs(const Case& c) : group_tokens(c.group_tokens) {
    std::mt19937 random(static_cast<unsigned>(c.experts));
    std::uniform_real_distribution<double> uniform(0, 1);
    for (const int64_t tokens : group_tokens) {
      for (int64_t t = 0; t < tokens; ++t)
        lse.push_back(static_cast<T>(random() % 9 ? 4 * uniform(random) - 1
                                                  : -std::numeric_limits<double>::infinity()));
      for (int64_t e = 0; e < c.experts; ++e) {
        score_sums.push_back(static_cast<T>(static_cast<double>(tokens) * uniform(random)));
        counts.push_back(tokens ? static_cast<int64_t>(random() % (2 * tokens)) : 0);
      }
    }
    shape = {static_cast<int64_t>(lse.size()), static_cast<int64_t>(group_tokens.size()), c.experts,
             false};
  }
};

template <class T> struct Results {
  Values<T> total, values, grad_lse, grad_score_sums;
};

// `run(params, count)` runs one of the three.
template <template <class> class Array, class T, class Run>
Results<T> run(const Inputs<T>& in, const Options& o, const Run& run) {
  RouterLossesShape shape = in.shape;
  shape.per_group = o.per_group;
  const bool scores = o.balance || o.importance;
  const Array<T> lse(in.lse), score_sums(in.score_sums), grad_total(Values<T>{T{1.5}});
  const Array<int64_t> counts(in.counts), group_tokens(in.group_tokens);
  const Array<T> total(1), values(3), grad_lse(o.z ? in.lse.size() : 0);
  const Array<T> grad_score_sums(scores ? in.score_sums.size() : 0);
  const Array<double> squares(shape.blocks()), slopes(1 + shape.sets() * shape.experts);

  if (o.z && shape.blocks() > 1)
    run(LseSquares<T>{shape, lse.data(), squares.data()}, shape.blocks());
  RouterLosses<T> p{shape,
                    scores ? score_sums.data() : nullptr,
                    o.balance ? counts.data() : nullptr,
                    group_tokens.data(),
                    o.z ? lse.data() : nullptr,
                    o.z && shape.blocks() > 1 ? squares.data() : nullptr,
                    o.importance,
                    o.switch_convention,
                    o.unbiased,
                    o.balance ? 0.5 : 0,
                    o.z ? 0.25 : 0,
                    o.importance ? 2.0 : 0,
                    total.data(),
                    values.data(),
                    nullptr,
                    nullptr};
  run(p, 1);
  p.total = p.values = nullptr;
  p.lse_slope = slopes.data();
  p.slopes = slopes.data() + 1;
  run(p, 1);
  run(RouterLossesBackward<T>{shape, grad_total.data(), p.lse, p.lse_slope, p.slopes,
                              grad_lse.data(), scores ? grad_score_sums.data() : nullptr},
      (o.z ? shape.tokens : 0) + (scores ? shape.groups * shape.experts : 0));
  return {total.to_host(), values.to_host(), grad_lse.to_host(), grad_score_sums.to_host()};
}

template <class T>
void expect_close(const char* what, const Values<T>& actual, const Values<T>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  double largest = std::numeric_limits<T>::min();
  for (const T x : expected) largest = std::max<double>(largest, std::abs(x));
  for (std::size_t i = 0; i < actual.size(); ++i)
    if (!(std::abs(actual[i] - expected[i]) <= 64 * std::numeric_limits<T>::epsilon() * largest)) {
      ADD_FAILURE() << what << " at " << i << ": " << actual[i] << ", on the CPU " << expected[i];
      return;
    }
}

template <class T> void expect_cuda_equals_cpu(const Inputs<T>& in, const Options& o) {
  SCOPED_TRACE(testing::Message() << o.balance << o.z << o.importance << " " << o.switch_convention
                                  << o.per_group << o.unbiased);
  const Results<T> cpu =
      run<HostArray>(in, o, [](const auto& p, int64_t count) { router_losses_cpu(p, 0, count); });
  const Results<T> cuda =
      run<DeviceArray>(in, o, [](const auto& p, int64_t) { router_losses_cuda(p, nullptr); });
  expect_close("total", cuda.total, cpu.total);
  expect_close("values", cuda.values, cpu.values);
  expect_close("grad_lse", cuda.grad_lse, cpu.grad_lse);
  expect_close("grad_score_sums", cuda.grad_score_sums, cpu.grad_score_sums);
}

class RouterLossesCuda : public testing::TestWithParam<Case> {
 protected:
  template <class T> void compare() {
    const Inputs<T> in(GetParam());
    for (int bits = 0; bits < 8; ++bits)
      expect_cuda_equals_cpu(in,
                             {true, true, true, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0});
  }
};
TEST_P(RouterLossesCuda, Float) { compare<float>(); }
TEST_P(RouterLossesCuda, Double) { compare<double>(); }

INSTANTIATE_TEST_SUITE_P(
    Cases, RouterLossesCuda,
    testing::Values(
        Case{"no_tokens", {0}, 8}, Case{"empty_groups", {0, 0, 0}, 5}, Case{"one_expert", {3}, 1},
        Case{"one_token", {1}, 8}, Case{"one_group", {300}, 8}, Case{"wide", {40}, 300},
        Case{"groups", {3, 0, 70, 1}, 33},
        Case{"more_groups_than_warps", {1, 2, 0, 3, 4, 5, 6, 0, 7, 8, 9, 1, 1, 0, 2, 1, 1, 3}, 7},
        Case{"one_block", {4096}, 4}, Case{"two_blocks", {4000, 97}, 3}, Case{"blocks", {9000}, 2}),
    [](const auto& info) { return info.param.name; });

TEST(RouterLossesCuda, EveryCombinationOfLosses) {
  const Inputs<float> in({"", {20, 0, 11}, 9});
  for (int bits = 1; bits < 8; ++bits)
    expect_cuda_equals_cpu(in, {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0});
}

}  // namespace
}  // namespace torch_routers
