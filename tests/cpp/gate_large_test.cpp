// Tokens whose logits, slots and partial results lie beyond 2^31 elements: the same results as those
// tokens alone.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "gate/gate_kernel.h"
#include "sparse.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int64_t kExperts = 8, kSlots = 8, kLast = 100;

template <class T> class Memory {
 public:
  explicit Memory(const GateShape& shape)
      : shape_(shape),
        logits_(shape.tokens * kExperts),
        weights_(shape.tokens * kSlots),
        lse_(shape.tokens),
        scores_(shape.blocks() * kExperts),
        partial_sums_(shape.segments() * kExperts),
        grad_logits_(shape.tokens * kExperts),
        indices_(shape.tokens * kSlots),
        partial_counts_(shape.segments() * kExperts) {}

  explicit operator bool() const {
    return logits_ && weights_ && lse_ && scores_ && partial_sums_ && grad_logits_ && indices_ &&
           partial_counts_;
  }

  // All results of the last tokens, one after the other.
  std::vector<T> run() {
    const int64_t first = shape_.tokens - kLast;
    for (int64_t i = 0; i < kLast * kExperts; ++i)
      logits_.data()[first * kExperts + i] = std::sin(T(i));
    const int64_t offsets[] = {0, first, shape_.tokens};

    Gate<T> forward{};
    static_cast<GateShape&>(forward) = shape_;
    forward.logits = logits_.data();
    forward.group_offsets = offsets;
    forward.indices = indices_.data();
    forward.weights = weights_.data();
    forward.lse = lse_.data();
    forward.scores = scores_.data();
    forward.partial_sums = partial_sums_.data();
    forward.partial_counts = partial_counts_.data();
    forward.select = true;
    gate_cpu(forward, first / shape_.kBlock, shape_.blocks());

    T score_sums[2 * kExperts];
    int64_t counts[2 * kExperts], group_tokens[2];
    GateCombine<T> combine{};
    static_cast<GateShape&>(combine) = shape_;
    combine.group_offsets = offsets;
    combine.partial_sums = partial_sums_.data();
    combine.partial_counts = partial_counts_.data();
    combine.score_sums = score_sums;
    combine.counts = counts;
    combine.group_tokens = group_tokens;
    gate_cpu(combine, 1, 2);

    GateBackward<T> backward{};
    static_cast<GateShape&>(backward) = shape_;
    backward.grad_weights = weights_.data();
    backward.grad_lse = lse_.data();
    backward.logits = logits_.data();
    backward.group_offsets = offsets;
    backward.indices = indices_.data();
    backward.grad_logits = grad_logits_.data();
    gate_cpu(backward, first, shape_.tokens);

    std::vector<T> results{T(group_tokens[1])};
    const auto append = [&](const auto* values, int64_t count) {
      results.insert(results.end(), values, values + count);
    };
    append(indices_.data() + first * kSlots, kLast * kSlots);
    append(weights_.data() + first * kSlots, kLast * kSlots);
    append(lse_.data() + first, kLast);
    append(score_sums + kExperts, kExperts);
    append(counts + kExperts, kExperts);
    append(grad_logits_.data() + first * kExperts, kLast * kExperts);
    return results;
  }

 private:
  GateShape shape_;
  Sparse<T> logits_, weights_, lse_, scores_, partial_sums_, grad_logits_;
  Sparse<int64_t> indices_, partial_counts_;
};

TEST(GateLarge, OffsetsBeyond32Bits) {
  constexpr int64_t kTokens = (int64_t{1} << 31) / kExperts + 256;
  static_assert((kTokens - kLast) * kExperts > int64_t{1} << 31);
  // The same place in its block, for the same sums.
  Memory<float> large({kTokens, kExperts, kSlots, 2}), small({256, kExperts, kSlots, 2});
  if (!large) GTEST_SKIP() << "this machine maps no memory that it does not have";
  EXPECT_EQ(large.run(), small.run());
}

}  // namespace
}  // namespace torch_routers
