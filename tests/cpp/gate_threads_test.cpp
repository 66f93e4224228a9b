// The gate on several threads: for ThreadSanitizer, and to the same bits as on one.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "gate/gate_kernel.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

struct Results {
  std::vector<int64_t> indices, counts, group_tokens;
  std::vector<float> weights, lse, score_sums, grad_logits;
  bool operator==(const Results&) const = default;
};

Results run(int threads) {
  const GateShape shape{1000, 33, 4, 3};
  const std::vector<int64_t> offsets{0, 100, 700, 1000};
  std::vector<float> logits(shape.tokens * shape.experts);
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (float& x : logits) x = normal(random);

  Results r;
  r.indices.resize(shape.tokens * shape.slots);
  r.weights.resize(shape.tokens * shape.slots);
  r.lse.resize(shape.tokens);
  r.counts.resize(shape.groups * shape.experts);
  r.score_sums.resize(shape.groups * shape.experts);
  r.group_tokens.resize(shape.groups);
  r.grad_logits.resize(logits.size());
  std::vector<float> scores(shape.blocks() * shape.experts);
  std::vector<float> partial_sums(shape.segments() * shape.experts);
  std::vector<int64_t> partial_counts(shape.segments() * shape.experts);
  const auto on_threads = [&](const auto& params, int64_t count) {
    run_on_threads(threads, count, [&](int64_t begin, int64_t end) {
      if (begin < end) gate_cpu(params, begin, end);
    });
  };

  Gate<float> forward{};
  static_cast<GateShape&>(forward) = shape;
  forward.logits = logits.data();
  forward.group_offsets = offsets.data();
  forward.indices = r.indices.data();
  forward.weights = r.weights.data();
  forward.lse = r.lse.data();
  forward.scores = scores.data();
  forward.partial_sums = partial_sums.data();
  forward.partial_counts = partial_counts.data();
  forward.select = true;
  on_threads(forward, shape.blocks());

  GateCombine<float> combine{};
  static_cast<GateShape&>(combine) = shape;
  combine.group_offsets = offsets.data();
  combine.partial_sums = partial_sums.data();
  combine.partial_counts = partial_counts.data();
  combine.score_sums = r.score_sums.data();
  combine.counts = r.counts.data();
  combine.group_tokens = r.group_tokens.data();
  on_threads(combine, shape.groups);

  GateBackward<float> backward{};
  static_cast<GateShape&>(backward) = shape;
  backward.grad_weights = r.weights.data();
  backward.grad_lse = r.lse.data();
  backward.grad_score_sums = r.score_sums.data();
  backward.logits = logits.data();
  backward.group_offsets = offsets.data();
  backward.indices = r.indices.data();
  backward.grad_logits = r.grad_logits.data();
  on_threads(backward, shape.tokens);
  return r;
}

TEST(GateThreads, GiveTheSameBits) {
  const Results expected = run(1);
  for (int threads = 2; threads <= 8; ++threads) EXPECT_TRUE(run(threads) == expected) << threads;
}

}  // namespace
}  // namespace torch_routers
