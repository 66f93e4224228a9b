// The gate on several threads: for ThreadSanitizer, and to the same bits as on one.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "gate_run.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

struct Results {
  std::vector<int64_t> indices, counts, group_tokens;
  std::vector<float> weights, lse, score_sums, grad_logits;
  bool operator==(const Results&) const = default;
};

Results run(const GateShape& shape, Score score, int threads) {
  const std::vector<int64_t> offsets{0, shape.tokens / 10, shape.tokens / 2, shape.tokens};
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
  std::vector<float> partial_sums(shape.segments() * shape.experts);
  std::vector<int64_t> partial_counts(shape.segments() * shape.experts);
  std::vector<int64_t> partial_tokens(shape.segments());
  std::vector<float> scratch(shape.blocks() * shape.scratch_size());

  GateArrays<float> a;
  a.shape = shape;
  a.logits = logits.data();
  a.group_offsets = offsets.data();
  a.weighing.score = score;
  a.indices = r.indices.data();
  a.weights = r.weights.data();
  a.lse = r.lse.data();
  a.counts = r.counts.data();
  a.score_sums = r.score_sums.data();
  a.group_tokens = r.group_tokens.data();
  a.grad_logits = r.grad_logits.data();
  a.grad_weights = r.weights.data();
  a.grad_lse = r.lse.data();
  a.grad_score_sums = r.score_sums.data();
  a.partial_sums = partial_sums.data();
  a.partial_counts = partial_counts.data();
  a.partial_tokens = partial_tokens.data();
  a.scratch = scratch.data();
  run_gate(a, [&](const auto& params, int64_t count) {
    run_on_threads(threads, count,
                   [&](int64_t begin, int64_t end) { gate_cpu(params, begin, end); });
  });
  return r;
}

TEST(GateThreads, GiveTheSameBits) {
  for (const GateShape shape : {GateShape{1000, 33, 4, 3}, GateShape{300, 1100, 40, 3}})
    for (const Score score : {Score::Softmax, Score::Sigmoid}) {
      const Results expected = run(shape, score, 1);
      for (int threads : {2, 3, 4, 8})
        EXPECT_TRUE(run(shape, score, threads) == expected) << threads;
    }
}

}  // namespace
}  // namespace torch_routers
