// The CUDA kernel of the recurrent cell against the CPU kernel.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "device_array.h"
#include "gru_cell_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

template <class T>
void expect_close(const char* what, const std::vector<T>& actual, const std::vector<T>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i)
    if (!(std::abs(actual[i] - expected[i]) <=
          32 * std::numeric_limits<T>::epsilon() * (1 + std::abs(expected[i])))) {
      ADD_FAILURE() << what << " at " << i << ": " << actual[i] << ", on the CPU " << expected[i];
      return;
    }
}

template <class T> void expect_cuda_equals_cpu(int64_t tokens, int64_t size) {
  SCOPED_TRACE(testing::Message() << tokens << " tokens of size " << size);
  const GruProblem<T> problem(tokens, size);
  const GruResults<T> cpu = problem.template run<HostArray>(
      [](const auto& p, int64_t tokens) { gru_cell_cpu(p, 0, tokens); });
  const GruResults<T> cuda =
      problem.template run<DeviceArray>([](const auto& p, int64_t) { gru_cell_cuda(p, nullptr); });
  expect_close("next", cuda.next, cpu.next);
  expect_close("grad_input_gates", cuda.grad_input_gates, cpu.grad_input_gates);
  expect_close("grad_hidden_gates", cuda.grad_hidden_gates, cpu.grad_hidden_gates);
  expect_close("grad_state", cuda.grad_state, cpu.grad_state);
}

TEST(GruCellCuda, EqualsTheCpu) {
  for (const int64_t tokens : {0, 1, 3, 40})
    for (const int64_t size : {1, 7, 128}) {
      expect_cuda_equals_cpu<float>(tokens, size);
      expect_cuda_equals_cpu<double>(tokens, size);
    }
}

}  // namespace
}  // namespace torch_routers
