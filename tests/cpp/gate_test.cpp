// The gate's CPU kernels on every instruction set: what the formulas of gate_kernel.h say, and that
// nothing is read or written that should not be. Memory is exact, so that sanitizers see each slip.
#include "gate/gate_kernel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace torch_routers {
namespace {

using std::int64_t;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Results {
  std::vector<int64_t> indices;
  std::vector<double> weights, lse, score_sums;
  std::vector<int64_t> counts, group_tokens;
};

struct Problem {
  int64_t tokens = 5, experts = 19, slots = 4;
  std::vector<double> logits;
  std::vector<char> valid = {};       // empty: all are
  std::vector<int64_t> offsets = {};  // empty: one group
  std::vector<int64_t> indices = {};  // empty: to be selected
  bool renormalize = true, statistics = true;

  static Problem random(int64_t tokens, int64_t experts, int64_t slots, unsigned seed = 0) {
    Problem p{tokens, experts, slots, std::vector<double>(tokens * experts)};
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (double& x : p.logits) x = normal(random);
    return p;
  }
  GateShape shape() const {
    return {tokens, experts, slots, offsets.empty() ? 1 : int64_t(offsets.size()) - 1};
  }
  const bool* valid_data() const {
    return valid.empty() ? nullptr : reinterpret_cast<const bool*>(valid.data());
  }
  const int64_t* offsets_data() const { return offsets.empty() ? nullptr : offsets.data(); }
};

class GateKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }

  template <class Params> void call(const Params& p, int64_t begin, int64_t end) {
    TORCH_ROUTERS_PICK_ISA(GetParam(), gate(p, begin, end));
  }

  Results run(const Problem& q) {
    const GateShape s = q.shape();
    Results r{q.indices,
              std::vector<double>(s.tokens * s.slots, 7),
              {},
              {},
              std::vector<int64_t>(s.groups * s.experts, 7),
              std::vector<int64_t>(s.groups, 7)};
    if (q.indices.empty()) r.indices.resize(s.tokens * s.slots, 7);
    if (q.statistics) {
      r.lse.resize(s.tokens, 7);
      r.score_sums.resize(s.groups * s.experts, 7);
    }
    std::vector<double> scores(s.blocks() * s.experts), sums(s.segments() * s.experts, 7);
    std::vector<int64_t> counts(s.segments() * s.experts, 7);
    const Gate<double> forward{s,
                               q.logits.data(),
                               q.valid_data(),
                               q.offsets_data(),
                               r.indices.data(),
                               r.weights.data(),
                               q.statistics ? r.lse.data() : nullptr,
                               scores.data(),
                               sums.data(),
                               counts.data(),
                               q.indices.empty(),
                               q.renormalize};
    call(forward, 0, s.blocks());
    const GateCombine<double> combine{s,
                                      q.valid_data(),
                                      q.offsets_data(),
                                      sums.data(),
                                      counts.data(),
                                      q.statistics ? r.score_sums.data() : nullptr,
                                      r.counts.data(),
                                      r.group_tokens.data()};
    call(combine, 0, s.groups);
    return r;
  }

  std::vector<double> gradient(const Problem& q, const std::vector<int64_t>& indices,
                               const std::vector<double>& weights, const std::vector<double>& lse,
                               const std::vector<double>& sums) {
    const auto given = [](const std::vector<double>& v) { return v.empty() ? nullptr : v.data(); };
    std::vector<double> result(q.logits.size(), 7);
    const GateBackward<double> backward{
        q.shape(),      given(weights),   given(lse),     given(sums),   q.logits.data(),
        q.valid_data(), q.offsets_data(), indices.data(), result.data(), q.renormalize};
    call(backward, 0, q.tokens);
    return result;
  }
};

TEST_P(GateKernel, SelectsAsAStableSortDoes) {
  for (int64_t experts : {1, 2, 7, 8, 31, 32, 33, 64, 65, 96, 256, 1000})
    for (int64_t slots : {int64_t{1}, std::min<int64_t>(8, experts), experts}) {
      Problem q = Problem::random(3, experts, slots);
      for (double& x : q.logits) x = std::round(2 * x);  // many ties
      const Results r = run(q);
      for (int64_t t = 0; t < q.tokens; ++t) {
        std::vector<int64_t> order(experts);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
          return q.logits[t * experts + a] > q.logits[t * experts + b];
        });
        for (int64_t j = 0; j < slots; ++j) EXPECT_EQ(r.indices[t * slots + j], order[j]);
      }
    }
}

TEST_P(GateKernel, NanComesFirstAndIndicesStayDistinct) {
  Problem q{1, 5, 5, {1, kNan, kInfinity, -kInfinity, kNan}};
  EXPECT_EQ(run(q).indices, (std::vector<int64_t>{1, 4, 2, 0, 3}));
  q.logits.assign(5, -kInfinity);
  const Results r = run(q);
  EXPECT_EQ(r.indices, (std::vector<int64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(r.weights, std::vector<double>(5, 0));
  EXPECT_EQ(r.lse[0], -kInfinity);
}

TEST_P(GateKernel, RenormalizedWeightsSumToOne) {
  const Problem q = Problem::random(70, 19, 4);
  const Results r = run(q);
  for (int64_t t = 0; t < q.tokens; ++t)
    EXPECT_NEAR(std::accumulate(&r.weights[t * 4], &r.weights[t * 4] + 4, 0.0), 1, 1e-14);
}

TEST_P(GateKernel, AWorkedExample) {
  Problem q{4, 3, 2, {2, 1, 0, 0, 2, 1, 3, 0, 1, 1, .5, 0}};
  const Results r = run(q);
  EXPECT_EQ(r.counts, (std::vector<int64_t>{3, 3, 2}));
  EXPECT_EQ(r.group_tokens, std::vector<int64_t>{4});
  const double mean_probs[] = {.5263867, .3147938, .1588195};
  for (int e = 0; e < 3; ++e) EXPECT_NEAR(r.score_sums[e] / 4, mean_probs[e], 5e-8);
  EXPECT_NEAR(r.lse[0], std::log(std::exp(2) + std::exp(1) + 1), 1e-14);
}

TEST_P(GateKernel, MaskedRowsAreNeverLookedAt) {
  for (const bool renormalize : {true, false}) {
    Problem q = Problem::random(130, 9, 3);
    q.renormalize = renormalize;
    q.valid.resize(q.tokens);
    for (int64_t t = 0; t < q.tokens; ++t) q.valid[t] = t % 3 != 1;
    const Results zero = run(q);
    for (int64_t t = 1; t < q.tokens; t += 3)
      std::fill_n(&q.logits[t * q.experts], q.experts, kNan);
    const Results nan = run(q);
    EXPECT_EQ(zero.weights, nan.weights);
    EXPECT_EQ(zero.indices, nan.indices);
    EXPECT_EQ(zero.score_sums, nan.score_sums);
    EXPECT_EQ(zero.lse, nan.lse);
    EXPECT_EQ(nan.indices[3], -1);
    EXPECT_EQ(nan.weights[3], 0);
    EXPECT_EQ(nan.group_tokens[0], 87);
    EXPECT_EQ(std::accumulate(nan.counts.begin(), nan.counts.end(), int64_t{0}), 3 * 87);
    const auto dx = gradient(q, nan.indices, std::vector<double>(q.tokens * 3, 1),
                             std::vector<double>(q.tokens, 1), std::vector<double>(9, 1));
    for (int64_t t = 1; t < q.tokens; t += 3)
      for (int64_t e = 0; e < q.experts; ++e) EXPECT_EQ(dx[t * q.experts + e], 0);
  }
}

TEST_P(GateKernel, GroupsAreSummedApart) {
  Problem q = Problem::random(300, 11, 2);
  q.offsets = {0, 0, 1, 64, 64, 129, 290, 300, 300};
  const Results grouped = run(q);
  for (int64_t g = 0; g < 8; ++g) {
    const int64_t first = q.offsets[g], past = q.offsets[g + 1];
    Problem part{past - first, q.experts, q.slots,
                 std::vector<double>(q.logits.begin() + first * q.experts,
                                     q.logits.begin() + past * q.experts)};
    const Results alone = run(part);
    EXPECT_EQ(grouped.group_tokens[g], past - first);
    for (int64_t e = 0; e < q.experts; ++e) {
      EXPECT_EQ(grouped.counts[g * q.experts + e], alone.counts[e]);
      EXPECT_NEAR(grouped.score_sums[g * q.experts + e], alone.score_sums[e], 1e-12);
    }
  }
}

TEST_P(GateKernel, BackwardIsTheFiniteDifference) {
  for (const bool renormalize : {true, false})
    for (const bool given : {true, false}) {
      Problem q = Problem::random(5, 19, 4);
      q.renormalize = renormalize;
      q.offsets = {0, 2, 5};
      if (given) q.indices = {3, 3, -1, 0, 1, 2, 4, 8, -1, -1, -1, -1, 18, 0, 18, 7, 5, -1, 6, 5};
      const Results at = run(q);
      const auto coefficients = [](std::size_t size, double phase) {
        std::vector<double> values(size);
        for (std::size_t i = 0; i < size; ++i) values[i] = std::sin(phase + i);
        return values;
      };
      const auto w = coefficients(at.weights.size(), 1), l = coefficients(at.lse.size(), 2),
                 s = coefficients(at.score_sums.size(), 3);
      const auto loss = [&] {
        const Results r = run(q);
        return std::inner_product(w.begin(), w.end(), r.weights.begin(), 0.0) +
               std::inner_product(l.begin(), l.end(), r.lse.begin(), 0.0) +
               std::inner_product(s.begin(), s.end(), r.score_sums.begin(), 0.0);
      };
      const auto dx = gradient(q, at.indices, w, l, s);
      for (std::size_t i = 0; i < q.logits.size(); ++i) {
        const double step = 1e-6, x = q.logits[i];
        q.logits[i] = x + step;
        const double above = loss();
        q.logits[i] = x - step;
        const double below = loss();
        q.logits[i] = x;
        EXPECT_NEAR(dx[i], (above - below) / (2 * step), 1e-7) << i;
      }
    }
}

TEST_P(GateKernel, GradientsAddUp) {
  Problem q = Problem::random(70, 8, 2);
  q.renormalize = false;
  const auto indices = run(q).indices;
  const std::vector<double> w(140, .5), l(70, -2), s(8, 3), none;
  const auto all = gradient(q, indices, w, l, s), of_w = gradient(q, indices, w, none, none),
             of_l = gradient(q, indices, none, l, none), of_s = gradient(q, indices, none, none, s);
  for (std::size_t i = 0; i < all.size(); ++i)
    EXPECT_NEAR(all[i], of_w[i] + of_l[i] + of_s[i], 1e-14);
}

TEST_P(GateKernel, NoTokens) {
  Problem q{0, 4, 2, {}};
  const Results r = run(q);
  EXPECT_EQ(r.counts, std::vector<int64_t>(4, 0));
  EXPECT_EQ(r.score_sums, std::vector<double>(4, 0));
  EXPECT_EQ(r.group_tokens, std::vector<int64_t>{0});
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, GateKernel,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

}  // namespace
}  // namespace torch_routers
