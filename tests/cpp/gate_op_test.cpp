// The operators as any C++ program calls them: through torch's dispatcher, without Python.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <tuple>

namespace {

using at::Tensor;

using Optional = std::optional<Tensor>;
constexpr int64_t kSoftmax = 0, kSigmoid = 1;

template <class Signature> auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Options {
  int64_t score = kSoftmax;
  bool renormalize = true;
  double epsilon = 0, scale = 1;
  Optional bias, token_top_k, valid_mask, group_offsets;
  int64_t num_groups = 1, topk_group = 1, group_best = 1;
  bool statistics = false;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Results topk_gate(const Tensor& logits, int64_t top_k, const Options& o) {
  static const auto op =
      find<Results(const Tensor&, int64_t, int64_t, bool, double, double, const Optional&, int64_t,
                   int64_t, int64_t, const Optional&, const Optional&, const Optional&, bool)>(
          "torch_routers::topk_gate");
  return op.call(logits, top_k, o.score, o.renormalize, o.epsilon, o.scale, o.bias, o.num_groups,
                 o.topk_group, o.group_best, o.token_top_k, o.valid_mask, o.group_offsets,
                 o.statistics);
}

Tensor topk_select(const Tensor& scores, int64_t top_k, const Options& o) {
  static const auto op =
      find<Tensor(const Tensor&, int64_t, int64_t, const Optional&, int64_t, int64_t, int64_t,
                  const Optional&, const Optional&)>("torch_routers::topk_select");
  return op.call(scores, top_k, o.score, o.bias, o.num_groups, o.topk_group, o.group_best,
                 o.token_top_k, o.valid_mask);
}

TEST(TopkGateOp, MatchesAten) {
  const Tensor x = at::randn({100, 17});
  Options options;
  options.renormalize = false;
  options.statistics = true;
  const auto [weights, indices, lse, score_sums, counts, tokens] = topk_gate(x, 3, options);
  const auto [expected_weights, expected_indices] = at::softmax(x, 1).topk(3);
  EXPECT_TRUE(at::allclose(weights, expected_weights));
  EXPECT_TRUE(at::equal(indices, expected_indices));
  EXPECT_TRUE(at::equal(topk_select(x, 3, options), expected_indices));
  EXPECT_TRUE(at::allclose(lse, at::logsumexp(x, 1)));
  EXPECT_TRUE(at::allclose(score_sums, at::softmax(x, 1).sum(0, true)));
  EXPECT_TRUE(at::equal(counts[0], at::bincount(indices.flatten(), {}, 17)));
  EXPECT_EQ(tokens.item<int64_t>(), 100);
}

TEST(TopkGateOp, BiasSelectsAndScoresWeigh) {
  const Tensor x = at::randn({100, 16}, at::kBFloat16);
  Options options;
  options.score = kSigmoid;
  options.epsilon = 1e-20;
  options.scale = 2.5;
  options.bias = at::randn({16});
  const auto [weights, indices, lse, score_sums, counts, tokens] = topk_gate(x, 3, options);
  const Tensor scores = at::sigmoid(x.to(at::kFloat));
  const Tensor chosen = std::get<1>((scores + *options.bias).topk(3));
  EXPECT_TRUE(at::equal(indices, chosen));
  const Tensor of_slots = scores.gather(1, chosen);
  EXPECT_TRUE(at::allclose(weights, 2.5 * of_slots / of_slots.sum(1, true)));
  EXPECT_EQ(weights.scalar_type(), at::kFloat);
}

TEST(TopkGateOp, GateOfGivenIndicesIsThatOfSelectedOnes) {
  const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, int64_t, bool, double, double, const Optional&, const Optional&,
      bool)>("torch_routers::gate");
  const Tensor x = at::randn({100, 17});
  Options options;
  options.statistics = true;
  options.token_top_k = at::randint(0, 4, {100}, at::kLong);
  const auto selected = topk_gate(x, 3, options);
  const auto given = op.call(x, std::get<1>(selected), kSoftmax, true, 0, 1, {}, {}, true);
  EXPECT_TRUE(at::equal(std::get<0>(given), std::get<0>(selected)));
  EXPECT_TRUE(at::equal(std::get<1>(given), std::get<2>(selected)));
  EXPECT_TRUE(at::equal(std::get<3>(given), std::get<4>(selected)));
  EXPECT_TRUE(at::equal((std::get<1>(selected) >= 0).sum(1), *options.token_top_k));
}

TEST(TopkGateOp, AcceptsNonContiguousTensors) {
  const Tensor x = at::randn({17, 64}).t(), valid = (at::rand({64, 2}) < 0.5).select(1, 0);
  Options options;
  options.valid_mask = valid;
  const Tensor weights = std::get<0>(topk_gate(x, 3, options));
  options.valid_mask = valid.contiguous();
  EXPECT_TRUE(at::equal(weights, std::get<0>(topk_gate(x.contiguous(), 3, options))));
}

TEST(TopkGateOp, SaysWhatIsWrong) {
  const auto said = [](const Tensor& x, int64_t top_k, const Options& options) -> std::string {
    try {
      topk_gate(x, top_k, options);
    } catch (const std::invalid_argument& error) { return error.what(); }
    return "nothing";
  };
  const Tensor x = at::zeros({2, 8});
  EXPECT_EQ(said(x, 9, {}), "topk_gate: expected top_k in [1, num_experts=8], got 9");
  Options options;
  options.score = 3;
  EXPECT_EQ(said(x, 2, options), "topk_gate: expected score in [0, 2], got 3");
  options = {};
  options.bias = at::zeros({7});
  EXPECT_EQ(said(x, 2, options), "topk_gate: expected bias of shape [num_experts=8], got [7]");
  options = {};
  options.num_groups = 3;
  EXPECT_EQ(said(x, 2, options), "topk_gate: expected num_groups to divide num_experts=8, got 3");
  options = {};
  options.token_top_k = at::full({2}, 3, at::kLong);
  EXPECT_EQ(said(x, 2, options), "topk_gate: expected token_top_k in [0, top_k=2], got 3");
}

}  // namespace
