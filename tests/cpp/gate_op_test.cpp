// The operators as any C++ program calls them: through torch's dispatcher, without Python.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>

#include <optional>
#include <tuple>

namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_gate(
    const Tensor& logits, int64_t top_k, bool renormalize, const std::optional<Tensor>& valid_mask,
    const std::optional<Tensor>& group_offsets, bool statistics) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_routers::topk_gate", "")
                             .typed<decltype(topk_gate)>();
  return op.call(logits, top_k, renormalize, valid_mask, group_offsets, statistics);
}

TEST(TopkGateOp, MatchesAten) {
  const Tensor x = at::randn({100, 17});
  const auto [weights, indices, lse, score_sums, counts, tokens] =
      topk_gate(x, 3, false, std::nullopt, std::nullopt, true);
  const auto [expected_weights, expected_indices] = at::softmax(x, 1).topk(3);
  EXPECT_TRUE(at::allclose(weights, expected_weights));
  EXPECT_TRUE(at::equal(indices, expected_indices));
  EXPECT_TRUE(at::allclose(lse, at::logsumexp(x, 1)));
  EXPECT_TRUE(at::allclose(score_sums, at::softmax(x, 1).sum(0, true)));
  EXPECT_TRUE(at::equal(counts[0], at::bincount(indices.flatten(), {}, 17)));
  EXPECT_EQ(tokens.item<int64_t>(), 100);
}

TEST(TopkGateOp, AcceptsNonContiguousTensors) {
  const Tensor x = at::randn({17, 64}).t(), valid = (at::rand({64, 2}) < 0.5).select(1, 0);
  EXPECT_TRUE(at::equal(
      std::get<0>(topk_gate(x, 3, true, valid, std::nullopt, false)),
      std::get<0>(topk_gate(x.contiguous(), 3, true, valid.contiguous(), std::nullopt, false))));
}

TEST(TopkGateOp, SaysWhatIsWrong) {
  try {
    topk_gate(at::zeros({2, 8}), 9, true, std::nullopt, std::nullopt, false);
    FAIL() << "expected an exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "topk_gate: expected top_k in [1, num_experts=8], got 9");
  }
}

}  // namespace
