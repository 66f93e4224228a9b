// The operators as any C++ program calls them: through torch's dispatcher, without Python.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>

#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Plan expert_plan(const Tensor& indices, c10::SymInt experts, std::optional<c10::SymInt> max_rows) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_routers::expert_plan", "")
                             .typed<decltype(expert_plan)>();
  return op.call(indices, experts, max_rows);
}

Plan expert_plan_from_weights(const Tensor& weights, std::optional<c10::SymInt> max_rows) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_routers::expert_plan_from_weights", "")
                             .typed<decltype(expert_plan_from_weights)>();
  return op.call(weights, max_rows);
}

TEST(ExpertPlanOp, MatchesAten) {
  const Tensor indices = at::randint(0, 17, {100, 3}, at::kLong);
  const auto [order, inverse, counts, offsets, dropped] = expert_plan(indices, 17, std::nullopt);
  EXPECT_TRUE(at::equal(order, indices.flatten().argsort(/*stable=*/true)));
  EXPECT_TRUE(at::equal(order.index_select(0, inverse.flatten()), at::arange(300)));
  EXPECT_TRUE(at::equal(counts, at::bincount(indices.flatten(), {}, 17)));
  EXPECT_TRUE(at::equal(offsets.slice(0, 1), counts.cumsum(0)));
  EXPECT_EQ(dropped.item<int64_t>(), 0);
}

TEST(ExpertPlanOp, AcceptsNonContiguousTensors) {
  const Tensor indices = at::randint(-1, 5, {3, 40}, at::kLong).t();
  const Tensor weights = at::relu(at::randn({5, 40, 2})).select(2, 1).t();
  EXPECT_TRUE(at::equal(std::get<0>(expert_plan(indices, 5, 90)),
                        std::get<0>(expert_plan(indices.contiguous(), 5, 90))));
  EXPECT_TRUE(at::equal(std::get<1>(expert_plan_from_weights(weights, 90)),
                        std::get<1>(expert_plan_from_weights(weights.contiguous(), 90))));
}

TEST(ExpertPlanOp, SaysWhatIsWrong) {
  const auto said = [](const auto& call) {
    try {
      call();
    } catch (const std::invalid_argument& error) { return std::string(error.what()); }
    return std::string("nothing");
  };
  EXPECT_EQ(said([] { expert_plan(at::zeros({2}, at::kLong), 3, std::nullopt); }),
            "expert_plan: expected indices of shape [tokens, slots], got [2]");
  EXPECT_EQ(said([] { expert_plan(at::full({2, 2}, 3, at::kLong), 3, std::nullopt); }),
            "expert_plan: expected indices in [-1, num_experts=3), got 3");
  EXPECT_EQ(said([] { expert_plan_from_weights(at::zeros({2, 0}), std::nullopt); }),
            "expert_plan_from_weights: expected weights of shape [tokens, num_experts] with "
            "num_experts >= 1, got [2, 0]");
}

}  // namespace
