// The CUDA kernels of token_dispatch against loops, in every type: exactly, as the inputs are such
// that any order of summation gives the same result.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "device_array.h"
#include "token_dispatch_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

template <class T> std::vector<double> results(const DeviceArray<T>& array) {
  return as_double(array.to_host());
}

// With `shift`, arrays of rows begin so many elements past a multiple of 16 bytes.
template <class T> class Shifted {
 public:
  Shifted(const std::vector<T>& values, int64_t shift)
      : array_(padded(values, shift)), shift_(shift) {}
  Shifted(std::size_t size, int64_t shift) : array_(size + shift), shift_(shift) {}
  T* data() const { return array_.data() + shift_; }
  std::vector<double> results() const {
    const std::vector<double> all = as_double(array_.to_host());
    return {all.begin() + shift_, all.end()};
  }

 private:
  static std::vector<T> padded(std::vector<T> values, int64_t shift) {
    values.insert(values.begin(), shift, T{});
    return values;
  }
  DeviceArray<T> array_;
  int64_t shift_;
};

template <class T> void expect_equals_loops(const DispatchProblem<T>& p, int64_t shift = 0) {
  const int64_t rows_size = p.max_rows() * p.shape.hidden;
  const DeviceArray<int64_t> order(p.order), inverse(p.inverse);
  const DispatchPlan plan = p.plan(order.data(), inverse.data());
  const DeviceArray<Compute<T>> all_weights(p.weights);
  const Shifted<T> token(p.token, shift), row(p.row, shift);
  for (const bool weighed : {false, true}) {
    SCOPED_TRACE(testing::Message()
                 << sizeof(T) << " bytes, shift " << shift << ", weights " << weighed);
    const DispatchReference<T> expected{p, weighed};
    const Compute<T>* weights = weighed ? all_weights.data() : nullptr;

    const Shifted<T> permuted(rows_size, shift);
    dispatch_cuda(Permute<T>{plan, token.data(), weights, permuted.data()}, nullptr);
    EXPECT_EQ(permuted.results(), as_double(expected.permute()));

    const Shifted<T> combined(p.token.size(), shift);
    dispatch_cuda(Combine<T>{plan, row.data(), weights, combined.data()}, nullptr);
    EXPECT_EQ(combined.results(), as_double(expected.combine()));

    const Shifted<T> grad_rows(weighed ? rows_size : 0, shift);
    const DeviceArray<Compute<T>> grad_weights(p.weights.size());
    dispatch_cuda(CombineBackward<T>{plan, token.data(), row.data(), weights, grad_rows.data(),
                                     grad_weights.data()},
                  nullptr);
    EXPECT_EQ(grad_weights.to_host(), expected.grad_weights());
    if (!weighed) continue;
    EXPECT_EQ(grad_rows.results(), as_double(expected.permute()));
  }
}

class TokenDispatchCuda : public testing::TestWithParam<DispatchCase> {
 protected:
  template <class T> void compare() { expect_equals_loops(DispatchProblem<T>(GetParam())); }
};
TEST_P(TokenDispatchCuda, Float) { compare<float>(); }
TEST_P(TokenDispatchCuda, Double) { compare<double>(); }
TEST_P(TokenDispatchCuda, BFloat16) { compare<BFloat16>(); }
TEST_P(TokenDispatchCuda, Float16) { compare<Float16>(); }

INSTANTIATE_TEST_SUITE_P(Cases, TokenDispatchCuda,
                         testing::Values(
                             // tokens, slots, hidden, spare rows, share of empty slots
                             DispatchCase{0, 2, 8, 3}, DispatchCase{3, 0, 8, 2},
                             DispatchCase{3, 2, 0, 1}, DispatchCase{4, 2, 8, 0, 1},
                             DispatchCase{4, 2, 8, 3, 1}, DispatchCase{1, 1, 1},
                             DispatchCase{5, 2, 8, 1}, DispatchCase{5, 3, 7, 2, .2},
                             DispatchCase{9, 1, 64, 3, .3}, DispatchCase{3, 8, 520, 1, .1},
                             DispatchCase{3, 2, 129, 0, .1}, DispatchCase{2, 2, 1032, 2},
                             DispatchCase{2, 19, 40, 5, .5}, DispatchCase{13, 4, 33, 3, .1}),
                         testing::PrintToStringParamName());

TEST(TokenDispatchCuda, RowsThatBeginAnywhere) {
  for (const int64_t shift : {1, 3}) {
    expect_equals_loops(DispatchProblem<float>({5, 2, 64, 1, .1}), shift);
    expect_equals_loops(DispatchProblem<BFloat16>({5, 2, 64, 1, .1}), shift);
  }
}

// The operator looks at plans on the CPU only. The tools watch for accesses out of bounds.
TEST(TokenDispatchCuda, PlansThatMakeNoSense) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  DispatchProblem<float> p({6, 2, 40, 3, .1});
  const std::vector<int64_t> rows{-2, p.max_rows(), int64_t{1} << 40, kMost, -kMost, 0};
  const std::vector<int64_t> slots{-2, 12, kMost, -kMost, 3};
  for (std::size_t i = 0; i < rows.size(); ++i) p.inverse[2 * i + 1] = rows[i];
  for (std::size_t i = 0; i < slots.size(); ++i) p.order[2 * i + 1] = slots[i];
  expect_equals_loops(p);
  std::fill(p.inverse.begin(), p.inverse.end(), 2);  // every slot in one row
  expect_equals_loops(p);
  std::fill(p.order.begin(), p.order.end(), 5);
  expect_equals_loops(p);
}

TEST(TokenDispatchCuda, TooLargeAGridIsAnError) {
  Permute<float> params{};
  params.max_rows = int64_t{1} << 40;
  EXPECT_THROW(dispatch_cuda(params, nullptr), std::runtime_error);
}

}  // namespace
}  // namespace torch_routers
