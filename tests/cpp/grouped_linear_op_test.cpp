// grouped_linear as any C++ program calls it: through torch's dispatcher, without Python.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>

namespace {

using at::Tensor;

Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets,
                      const std::optional<Tensor>& bias, std::optional<c10::string_view> engine) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_routers::grouped_linear", "")
                             .typed<decltype(grouped_linear)>();
  return op.call(x, weight, offsets, bias, engine);
}

TEST(GroupedLinearOp, EveryEngineMatchesAten) {
  const Tensor x = at::randn({6, 4}), weight = at::randn({2, 8, 4}), bias = at::randn({2, 8});
  const Tensor offsets = at::tensor({0, 2, 5}, at::kLong);
  for (const std::optional<c10::string_view> engine :
       {std::optional<c10::string_view>(), {"native"}, {"mm"}, {"grouped_mm"}}) {
    const Tensor y = grouped_linear(x, weight, offsets, bias, engine);
    EXPECT_TRUE(at::allclose(y.slice(0, 0, 2), at::linear(x.slice(0, 0, 2), weight[0], bias[0])));
    EXPECT_TRUE(at::allclose(y.slice(0, 2, 5), at::linear(x.slice(0, 2, 5), weight[1], bias[1])));
    EXPECT_TRUE(at::equal(y[5], at::zeros({8})));
  }
}

TEST(GroupedLinearOp, SaysWhatIsWrong) {
  try {
    grouped_linear(at::zeros({2, 3}), at::zeros({1, 4, 3}), at::tensor({0, 2}, at::kLong),
                   std::nullopt, "fast");
    FAIL() << "expected an exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "grouped_linear: expected engine among mm, native for in_features=3 and "
                 "out_features=4 in float32, got fast");
  }
}

}  // namespace
