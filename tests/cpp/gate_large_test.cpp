// Tokens whose logits, slots and partial results lie beyond 2^31 elements: the same results as those
// tokens alone.
#include <gtest/gtest.h>

#include <cmath>
#include <type_traits>
#include <vector>

#include "gate_run.h"
#include "sparse.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int64_t kExperts = 8, kSlots = 8, kLast = 100;

// All results of the last tokens, one after the other; none if there is no room.
std::vector<float> results_of_the_last(int64_t tokens) {
  const GateShape shape{tokens, kExperts, kSlots, 2};
  const Sparse<float> logits(tokens * kExperts), weights(tokens * kSlots), lse(tokens),
      partial_sums(shape.segments() * kExperts), grad_logits(tokens * kExperts);
  const Sparse<int64_t> indices(tokens * kSlots), partial_counts(shape.segments() * kExperts),
      partial_tokens(shape.segments());
  if (!(logits && weights && lse && partial_sums && grad_logits && indices && partial_counts &&
        partial_tokens))
    return {};
  const int64_t first = tokens - kLast, offsets[] = {0, first, tokens};
  for (int64_t i = 0; i < kLast * kExperts; ++i)
    logits.data()[first * kExperts + i] = std::sin(static_cast<float>(i));

  float score_sums[2 * kExperts];
  int64_t counts[2 * kExperts], group_tokens[2];
  GateArrays<float> a;
  a.shape = shape;
  a.logits = logits.data();
  a.group_offsets = offsets;
  a.weighing.renormalize = false;
  a.indices = indices.data();
  a.weights = weights.data();
  a.lse = lse.data();
  a.counts = counts;
  a.score_sums = score_sums;
  a.group_tokens = group_tokens;
  a.grad_logits = grad_logits.data();
  a.grad_weights = weights.data();
  a.grad_lse = lse.data();
  a.partial_sums = partial_sums.data();
  a.partial_counts = partial_counts.data();
  a.partial_tokens = partial_tokens.data();
  run_gate(a, [&](const auto& params, int64_t count) {
    const bool combines = std::is_same_v<decltype(params), const GateCombine<float>&>;
    gate_cpu(params, combines ? 1 : first / GateShape::kBlock, count);
  });

  std::vector<float> results;
  const auto append = [&](const auto* values, int64_t count) {
    results.insert(results.end(), values, values + count);
  };
  append(indices.data() + first * kSlots, kLast * kSlots);
  append(weights.data() + first * kSlots, kLast * kSlots);
  append(lse.data() + first, kLast);
  append(grad_logits.data() + first * kExperts, kLast * kExperts);
  append(score_sums + kExperts, kExperts);
  append(counts + kExperts, kExperts);
  append(group_tokens + 1, 1);
  return results;
}

TEST(GateLarge, OffsetsBeyond32Bits) {
  constexpr int64_t kTokens = (int64_t{1} << 31) / kExperts + 256;
  static_assert((kTokens - kLast) * kExperts > int64_t{1} << 31);
  const auto large = results_of_the_last(kTokens);
  if (large.empty()) GTEST_SKIP() << "this machine maps no memory that it does not have";
  EXPECT_EQ(large, results_of_the_last(256));  // at the same places of their blocks: the same sums
}

}  // namespace
}  // namespace torch_routers
