// The gate's CPU kernels on every instruction set: what the formulas of gate_kernel.h say, and that
// nothing is read or written that should not be. Memory is exact, so that sanitizers see each slip.
#include "gate/gate_kernel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

namespace torch_routers {
namespace {

using std::int64_t;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class C> struct Results {
  std::vector<int64_t> indices;
  std::vector<C> weights, lse, score_sums;
  std::vector<int64_t> counts, group_tokens;

  bool operator==(const Results&) const = default;
};

template <class S> struct ProblemOf {
  using C = Compute<S>;
  int64_t tokens = 5, experts = 19, slots = 4;
  std::vector<S> logits;
  std::vector<char> valid = {};       // empty: all are
  std::vector<int64_t> offsets = {};  // empty: one group
  std::vector<int64_t> indices = {};  // empty: to be selected
  bool renormalize = true, statistics = true;
  Score score = Score::Softmax;
  C epsilon = 0, scale = 1;
  std::vector<C> bias = {};                                    // empty: none
  int64_t expert_groups = 0, kept_groups = 1, group_best = 1;  // 0: none
  std::vector<int64_t> token_top_k = {};                       // empty: slots

  static ProblemOf random(int64_t tokens, int64_t experts, int64_t slots, unsigned seed = 0) {
    ProblemOf p{tokens, experts, slots, std::vector<S>(tokens * experts)};
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (S& x : p.logits) store(&x, static_cast<C>(normal(random)));
    return p;
  }
  GateShape shape() const {
    return {tokens, experts, slots, offsets.empty() ? 1 : int64_t(offsets.size()) - 1};
  }
  GateWeights<C> weighing() const { return {score, renormalize, epsilon, scale}; }
  const bool* valid_data() const { return reinterpret_cast<const bool*>(or_null(valid)); }
  template <class T> static const T* or_null(const std::vector<T>& v) {
    return v.empty() ? nullptr : v.data();
  }
  bool is_valid(int64_t t) const { return valid.empty() || valid[t]; }
  double logit(int64_t t, int64_t e) const { return load(logits[t * experts + e]); }
};
using Problem = ProblemOf<double>;

// ---- the kernels -------------------------------------------------------------------------------

template <class Params> void call(Isa isa, const Params& p, int64_t begin, int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa, gate(p, begin, end));
}

template <class S> Results<Compute<S>> run(Isa isa, const ProblemOf<S>& q) {
  using C = Compute<S>;
  const GateShape s = q.shape();
  Results<C> r{
      q.indices, std::vector<C>(s.tokens * s.slots, 7),         {},
      {},        std::vector<int64_t>(s.groups * s.experts, 7), std::vector<int64_t>(s.groups, 7)};
  if (q.indices.empty()) r.indices.resize(s.tokens * s.slots, 7);
  if (q.statistics) {
    r.lse.resize(s.tokens, 7);
    r.score_sums.resize(s.groups * s.experts, 7);
  }
  std::vector<C> scratch(s.blocks() * s.scratch_size()), sums(s.segments() * s.experts, 7);
  std::vector<int64_t> counts(s.segments() * s.experts, 7), tokens(s.segments(), 7);
  const Gate<S> forward{s,
                        q.logits.data(),
                        q.valid_data(),
                        q.or_null(q.offsets),
                        q.or_null(q.token_top_k),
                        r.indices.data(),
                        r.weights.data(),
                        q.statistics ? r.lse.data() : nullptr,
                        sums.data(),
                        counts.data(),
                        tokens.data(),
                        s.scratch_size() ? scratch.data() : nullptr,
                        q.indices.empty(),
                        {q.or_null(q.bias), q.expert_groups, q.kept_groups, q.group_best},
                        q.weighing()};
  call(isa, forward, 0, s.blocks());
  const GateCombine<C> combine{s,
                               q.or_null(q.offsets),
                               sums.data(),
                               counts.data(),
                               tokens.data(),
                               q.statistics ? r.score_sums.data() : nullptr,
                               r.counts.data(),
                               r.group_tokens.data()};
  call(isa, combine, 0, s.groups);

  Gate<S> select = forward;  // alone
  std::vector<int64_t> indices(s.tokens * s.slots, 7);
  select.indices = indices.data();
  select.weights = select.lse = select.partial_sums = nullptr;
  select.partial_counts = select.partial_tokens = nullptr;
  if (select.select) {
    call(isa, select, 0, s.blocks());
    EXPECT_EQ(indices, r.indices);
  }
  return r;
}

template <class S, class C = Compute<S>>
std::vector<S> gradient(Isa isa, const ProblemOf<S>& q, const std::vector<int64_t>& indices,
                        const std::vector<C>& weights, const std::vector<C>& lse,
                        const std::vector<C>& sums) {
  const GateShape s = q.shape();
  std::vector<S> result(q.logits.size());
  std::vector<C> scratch(s.blocks() * s.scratch_size());
  const GateBackward<S> backward{s,
                                 q.or_null(weights),
                                 q.or_null(lse),
                                 q.or_null(sums),
                                 q.logits.data(),
                                 q.valid_data(),
                                 q.or_null(q.offsets),
                                 indices.data(),
                                 result.data(),
                                 s.scratch_size() ? scratch.data() : nullptr,
                                 q.weighing()};
  call(isa, backward, 0, s.blocks());
  return result;
}

// ---- the formulas, in plain loops --------------------------------------------------------------

double score(Score kind, double x, double lse) {
  if (kind == Score::Softmax) return std::exp(x - lse);
  if (kind == Score::Sigmoid) return 1 / (1 + std::exp(-x));
  if (kind == Score::SqrtSoftplus) return std::sqrt(std::log1p(std::exp(x)));
  return x;
}

template <class Value> std::vector<int64_t> best_of(int64_t size, int64_t count,
                                                    const Value& value) {
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return value(a) > value(b); });
  order.resize(count);
  return order;
}

template <class S>
std::vector<int64_t> select(const ProblemOf<S>& q, int64_t t, const std::vector<double>& scores) {
  std::vector<double> values(q.experts), of_groups(q.experts);
  for (int64_t e = 0; e < q.experts; ++e) {
    const double bias = q.bias.empty() ? 0 : q.bias[e];
    values[e] = q.bias.empty() ? q.logit(t, e) : scores[e] + bias;
    of_groups[e] = q.bias.empty() && q.group_best == 1 ? q.logit(t, e) : scores[e] + bias;
  }
  std::vector<bool> is_out(q.experts, q.expert_groups > 0);
  if (q.expert_groups) {
    const int64_t size = q.experts / q.expert_groups;
    const auto group_value = [&](int64_t g) {
      double sum = 0;
      const auto value = [&](int64_t i) { return of_groups[g * size + i]; };
      for (const int64_t i : best_of(size, q.group_best, value)) sum += value(i);
      return sum;
    };
    for (const int64_t g : best_of(q.expert_groups, q.kept_groups, group_value))
      std::fill_n(is_out.begin() + g * size, size, false);
  }
  std::vector<int64_t> chosen;
  for (const int64_t e : best_of(q.experts, q.experts, [&](int64_t e) { return values[e]; }))
    if (!is_out[e]) chosen.push_back(e);
  chosen.resize(q.token_top_k.empty() ? q.slots : q.token_top_k[t]);
  chosen.resize(q.slots, -1);
  return chosen;
}

template <class S> Results<double> expected(const ProblemOf<S>& q) {
  const GateShape s = q.shape();
  Results<double> r{q.indices,
                    {},
                    {},
                    {},
                    std::vector<int64_t>(s.groups * s.experts),
                    std::vector<int64_t>(s.groups)};
  if (q.statistics) r.score_sums.resize(s.groups * s.experts);
  for (int64_t t = 0, group = 0; t < q.tokens; ++t) {
    while (!q.offsets.empty() && t >= q.offsets[group + 1]) ++group;
    double sum = 0, all = 0, divisor = q.epsilon;
    for (int64_t e = 0; e < q.experts; ++e) sum += std::exp(q.logit(t, e));
    const double lse = std::log(sum);
    std::vector<double> scores;
    for (int64_t e = 0; e < q.experts; ++e) {
      scores.push_back(score(q.score, q.logit(t, e), lse));
      all += scores[e];
    }
    std::vector<int64_t> chosen(q.slots, -1);
    if (!q.indices.empty())
      chosen.assign(&q.indices[t * q.slots], &q.indices[t * q.slots] + q.slots);
    else if (q.is_valid(t))
      chosen = select(q, t, scores);
    if (q.indices.empty()) r.indices.insert(r.indices.end(), chosen.begin(), chosen.end());
    if (!q.is_valid(t)) chosen.assign(q.slots, -1);
    for (const int64_t e : chosen)
      if (e >= 0) divisor += scores[e], ++r.counts[group * q.experts + e];
    for (const int64_t e : chosen)
      r.weights.push_back(e < 0 ? 0 : q.scale * scores[e] / (q.renormalize ? divisor : 1));
    r.group_tokens[group] += q.is_valid(t);
    if (!q.statistics) continue;
    r.lse.push_back(q.is_valid(t) ? lse : 0);
    for (int64_t e = 0; q.is_valid(t) && e < q.experts; ++e)
      r.score_sums[group * q.experts + e] += scores[e] / all;
  }
  return r;
}

template <class C>
void expect_near(const char* what, const std::vector<C>& actual,
                 const std::vector<double>& expected) {
  const double limit = 2000 * std::numeric_limits<C>::epsilon();
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (std::size_t i = 0; i < actual.size(); ++i)
    ASSERT_NEAR(actual[i], expected[i], limit * (1e-6 + std::abs(expected[i]))) << what << " " << i;
}

template <class S> void expect_formulas(Isa isa, const ProblemOf<S>& q) {
  SCOPED_TRACE(testing::Message() << q.tokens << "x" << q.experts << " top " << q.slots << " score "
                                  << static_cast<int64_t>(q.score) << " renormalize "
                                  << q.renormalize << " epsilon " << q.epsilon << " groups "
                                  << q.expert_groups << " bias " << !q.bias.empty());
  const auto actual = run(isa, q);
  const auto formulas = expected(q);
  EXPECT_EQ(actual.indices, formulas.indices);
  EXPECT_EQ(actual.counts, formulas.counts);
  EXPECT_EQ(actual.group_tokens, formulas.group_tokens);
  expect_near("weights", actual.weights, formulas.weights);
  expect_near("lse", actual.lse, formulas.lse);
  expect_near("score_sums", actual.score_sums, formulas.score_sums);
}

// ---- tests -------------------------------------------------------------------------------------

class GateKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }
  template <class S> auto run(const ProblemOf<S>& q) { return torch_routers::run(GetParam(), q); }
  std::vector<double> gradient(const Problem& q, const std::vector<int64_t>& indices,
                               const std::vector<double>& weights, const std::vector<double>& lse,
                               const std::vector<double>& sums) {
    return torch_routers::gradient(GetParam(), q, indices, weights, lse, sums);
  }
};

constexpr Score kScores[] = {Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus};

// In tiles and row by row, on the stack and in scratch, in one block and in several.
template <class S> std::vector<ProblemOf<S>> some_problems() {
  std::vector<ProblemOf<S>> problems = {
      ProblemOf<S>::random(70, 19, 4),   ProblemOf<S>::random(33, 64, 16),
      ProblemOf<S>::random(150, 8, 2),   ProblemOf<S>::random(5, 20, 17),
      ProblemOf<S>::random(70, 65, 8),   ProblemOf<S>::random(3, 256, 8),
      ProblemOf<S>::random(2, 1025, 33), ProblemOf<S>::random(3, 1, 1)};
  for (auto& q : problems) {
    std::mt19937 random(q.tokens);
    q.offsets = {0, q.tokens / 3, q.tokens / 3, q.tokens};
    for (int64_t t = 0; t < q.tokens; ++t) q.valid.push_back(t % 5 != 2);
    for (int64_t t = 0; t < q.tokens; ++t) q.token_top_k.push_back(random() % (q.slots + 1));
  }
  return problems;
}

template <class S> void check_formulas(Isa isa) {
  using C = Compute<S>;
  for (auto q : some_problems<S>())
    for (const Score score : kScores)
      for (const double epsilon : {0.0, 0.25})
        for (const bool renormalize : {false, true}) {
          q.score = score;
          q.epsilon = static_cast<C>(epsilon);
          q.renormalize = renormalize;
          q.scale = renormalize ? C{1} : C{2.5};
          q.statistics = q.slots != 2;
          expect_formulas(isa, q);
        }
}
TEST_P(GateKernel, FollowsTheFormulasInFloat) { check_formulas<float>(GetParam()); }
TEST_P(GateKernel, FollowsTheFormulasInDouble) { check_formulas<double>(GetParam()); }

TEST_P(GateKernel, SelectsByBiasAndGroups) {
  for (auto q : some_problems<double>())
    for (const Score score : {Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Identity})
      for (const bool has_bias : {false, true})
        for (const int64_t groups : {0, 4, 5}) {
          if (groups && (q.experts % groups || 2 * q.experts / groups < q.slots)) continue;
          q.score = score;
          q.statistics = score != Score::Identity;
          q.bias.clear();
          if (has_bias) q.bias = Problem::random(1, q.experts, 1, 5).logits;
          q.expert_groups = groups;
          q.kept_groups = 2;
          for (int64_t best = 1; best <= (groups ? std::min<int64_t>(3, q.experts / groups) : 1);
               ++best) {
            q.group_best = best;
            expect_formulas(GetParam(), q);
          }
        }
}

TEST_P(GateKernel, OfEqualGroupsTheFirstIsKept) {
  Problem q{1, 8, 4, {0, 1, 1, 0, 2, -1, 1, 0}};
  q.expert_groups = 4;
  q.kept_groups = 2;
  EXPECT_EQ(run(q).indices, (std::vector<int64_t>{4, 1, 0, 5}));
  q.group_best = 2;
  q.score = Score::Identity;
  q.statistics = false;
  EXPECT_EQ(run(q).indices, (std::vector<int64_t>{1, 2, 0, 3}));
}

TEST_P(GateKernel, AnExpertOfAGroupThatIsOutIsNotTakenForMinusInfinity) {
  for (const int64_t slots : {2, 20, 40}) {
    Problem q{1, 160, slots, std::vector<double>(160, -kInfinity)};
    q.expert_groups = 4;
    q.logits[90] = 1;
    const auto indices = run(q).indices;
    EXPECT_EQ(indices[0], 90);
    for (int64_t j = 1; j < slots; ++j) EXPECT_EQ(indices[j], 79 + j + (79 + j >= 90));
  }
}

template <class S> void check_ties(Isa isa) {
  for (const int64_t experts :
       {1, 2, 3, 7, 8, 31, 32, 33, 64, 65, 96, 128, 250, 256, 257, 1000, 1024, 1025, 2000})
    for (const int64_t slots :
         std::set<int64_t>{1, std::min<int64_t>(8, experts), std::min<int64_t>(16, experts),
                           std::min<int64_t>(32, experts), experts}) {
      auto q = ProblemOf<S>::random(3, experts, slots);
      for (S& x : q.logits) store(&x, std::round(2 * load(x)));  // many ties
      const auto indices = run(isa, q).indices;
      for (int64_t t = 0; t < q.tokens; ++t)
        ASSERT_EQ(std::vector<int64_t>(&indices[t * slots], &indices[t * slots] + slots),
                  best_of(experts, slots, [&](int64_t e) { return q.logit(t, e); }))
            << experts << " top " << slots;
    }
}
TEST_P(GateKernel, SelectsAsAStableSortDoes) {
  check_ties<double>(GetParam());
  check_ties<float>(GetParam());
}

TEST_P(GateKernel, NanComesFirstAndIndicesStayDistinct) {
  Problem q{1, 5, 5, {1, kNan, kInfinity, -kInfinity, kNan}};
  EXPECT_EQ(run(q).indices, (std::vector<int64_t>{1, 4, 2, 0, 3}));
  q.logits.assign(5, -kInfinity);
  const auto r = run(q);
  EXPECT_EQ(r.indices, (std::vector<int64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(r.weights, std::vector<double>(5, 0));
  EXPECT_EQ(r.lse[0], -kInfinity);
}

TEST_P(GateKernel, IndicesAreDistinctWhateverTheLogits) {
  for (const int64_t experts : {8, 64, 300, 1100})
    for (const Score score : kScores)
      for (const bool has_bias : {false, true})
        for (const int64_t groups : {0, 4}) {
          auto q = ProblemOf<float>::random(7, experts, std::min<int64_t>(experts / 2, 40));
          const float odd[] = {INFINITY, -INFINITY, NAN, 3e38f, -3e38f, 0};
          for (int64_t i = 0; i < q.tokens * experts; ++i)
            if (i / experts == 6 || i % 3) q.logits[i] = odd[i / experts % 6];
          q.score = score;
          q.expert_groups = groups;
          q.kept_groups = 2;
          if (has_bias) q.bias.assign(experts, -INFINITY);
          const auto indices = run(q).indices;
          for (int64_t t = 0; t < q.tokens; ++t) {
            const std::set<int64_t> distinct(&indices[t * q.slots],
                                             &indices[t * q.slots] + q.slots);
            EXPECT_EQ(distinct.size(), q.slots);
            EXPECT_GE(*distinct.begin(), 0);
            EXPECT_LT(*distinct.rbegin(), experts);
          }
        }
}

// Bits, for every storage type: the plain instruction set against this one.
template <class S> void expect_equal_bits(Isa isa) {
  for (auto q : some_problems<S>())
    for (const Score score : kScores)
      for (const bool has_bias : {false, true}) {
        q.score = score;
        q.bias.clear();
        if (has_bias) q.bias = ProblemOf<Compute<S>>::random(1, q.experts, 1, 5).logits;
        const auto here = run(isa, q);
        EXPECT_TRUE(here == run(Isa::Default, q));
        const auto of_here =
            gradient(isa, q, here.indices, here.weights, here.lse, here.score_sums);
        const auto plain =
            gradient(Isa::Default, q, here.indices, here.weights, here.lse, here.score_sums);
        EXPECT_EQ(std::memcmp(of_here.data(), plain.data(), plain.size() * sizeof(S)), 0);
      }
}
TEST_P(GateKernel, BitsAreThoseOfEveryInstructionSet) {
  expect_equal_bits<float>(GetParam());
  expect_equal_bits<double>(GetParam());
  expect_equal_bits<BFloat16>(GetParam());
  expect_equal_bits<Float16>(GetParam());
}

// The same numbers in float give the same bits; the gradient is rounded once.
template <class S> void expect_bits_of_float(Isa isa) {
  for (auto q : some_problems<S>())
    for (const Score score : kScores)
      for (const bool renormalize : {false, true}) {
        q.score = score;
        q.renormalize = renormalize;
        ProblemOf<float> wide{q.tokens, q.experts, q.slots, {}};
        for (const S x : q.logits) wide.logits.push_back(load(x));
        wide.valid = q.valid;
        wide.offsets = q.offsets;
        wide.token_top_k = q.token_top_k;
        wide.score = score;
        wide.renormalize = renormalize;
        const auto r = run(isa, q);
        EXPECT_TRUE(r == run(isa, wide));
        const auto dx = gradient(isa, q, r.indices, r.weights, r.lse, r.score_sums);
        const auto exact = gradient(isa, wide, r.indices, r.weights, r.lse, r.score_sums);
        for (std::size_t i = 0; i < dx.size(); ++i) {
          S rounded;
          store(&rounded, exact[i]);
          ASSERT_EQ(dx[i].bits, rounded.bits) << i;
        }
      }
}
TEST_P(GateKernel, HalfTypesAreFloatsRoundedOnce) {
  expect_bits_of_float<BFloat16>(GetParam());
  expect_bits_of_float<Float16>(GetParam());
}

TEST_P(GateKernel, RenormalizedWeightsSumToOne) {
  const Problem q = Problem::random(70, 19, 4);
  const auto r = run(q);
  for (int64_t t = 0; t < q.tokens; ++t)
    EXPECT_NEAR(std::accumulate(&r.weights[t * 4], &r.weights[t * 4] + 4, 0.0), 1, 1e-14);
}

TEST_P(GateKernel, AWorkedExample) {
  Problem q{4, 3, 2, {2, 1, 0, 0, 2, 1, 3, 0, 1, 1, .5, 0}};
  const auto r = run(q);
  EXPECT_EQ(r.counts, (std::vector<int64_t>{3, 3, 2}));
  EXPECT_EQ(r.group_tokens, std::vector<int64_t>{4});
  const double mean_probs[] = {.5263867, .3147938, .1588195};
  for (int e = 0; e < 3; ++e) EXPECT_NEAR(r.score_sums[e] / 4, mean_probs[e], 5e-8);
  EXPECT_NEAR(r.lse[0], std::log(std::exp(2) + std::exp(1) + 1), 1e-14);
}

TEST_P(GateKernel, MaskedRowsAreNeverLookedAt) {
  for (const int64_t experts : {9, 70})
    for (const Score score : kScores)
      for (const bool renormalize : {true, false}) {
        Problem q = Problem::random(130, experts, 3);
        q.score = score;
        q.renormalize = renormalize;
        q.valid.resize(q.tokens);
        for (int64_t t = 0; t < q.tokens; ++t) q.valid[t] = t % 3 != 1;
        const auto zero = run(q);
        for (int64_t t = 1; t < q.tokens; t += 3)
          std::fill_n(&q.logits[t * q.experts], q.experts, kNan);
        const auto nan = run(q);
        EXPECT_TRUE(nan == zero);
        EXPECT_EQ(nan.indices[3], -1);
        EXPECT_EQ(nan.weights[3], 0);
        EXPECT_EQ(nan.group_tokens[0], 87);
        EXPECT_EQ(std::accumulate(nan.counts.begin(), nan.counts.end(), int64_t{0}), 3 * 87);
        const auto dx = gradient(q, nan.indices, std::vector<double>(q.tokens * 3, 1),
                                 std::vector<double>(q.tokens, 1), std::vector<double>(experts, 1));
        for (int64_t t = 1; t < q.tokens; t += 3)
          for (int64_t e = 0; e < q.experts; ++e) EXPECT_EQ(dx[t * q.experts + e], 0);
      }
}

TEST_P(GateKernel, BackwardIsTheFiniteDifference) {
  for (const int64_t experts : {19, 70})  // in tiles, row by row
    for (const Score score : kScores)
      for (const double epsilon : {0.0, 0.25})
        for (const bool renormalize : {true, false})
          for (const bool given : {true, false}) {
            Problem q = Problem::random(5, experts, 4);
            q.score = score;
            q.renormalize = renormalize;
            q.epsilon = epsilon;
            q.scale = 1.5;
            q.offsets = {0, 2, 5};
            if (given)
              q.indices = {3, 3, -1, 0, 1, 2, 4, 8, -1, -1, -1, -1, 18, 0, 18, 7, 5, -1, 6, 5};
            const auto at = run(q);
            const auto coefficients = [](std::size_t size, double phase) {
              std::vector<double> values(size);
              for (std::size_t i = 0; i < size; ++i) values[i] = std::sin(phase + i);
              return values;
            };
            const auto w = coefficients(at.weights.size(), 1), l = coefficients(at.lse.size(), 2),
                       s = coefficients(at.score_sums.size(), 3);
            const auto loss = [&] {
              const auto r = run(q);
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
              ASSERT_NEAR(dx[i], (above - below) / (2 * step), 1e-7) << i;
            }
          }
}

TEST_P(GateKernel, GradientsAddUp) {
  for (const int64_t experts : {8, 70})
    for (const Score score : kScores) {
      Problem q = Problem::random(70, experts, 2);
      q.score = score;
      q.renormalize = false;
      const auto indices = run(q).indices;
      const std::vector<double> w(140, .5), l(70, -2), s(experts, 3), none;
      const auto all = gradient(q, indices, w, l, s), of_w = gradient(q, indices, w, none, none),
                 of_l = gradient(q, indices, none, l, none),
                 of_s = gradient(q, indices, none, none, s);
      for (std::size_t i = 0; i < all.size(); ++i)
        EXPECT_NEAR(all[i], of_w[i] + of_l[i] + of_s[i], 1e-14);
    }
}

TEST_P(GateKernel, NoTokens) {
  Problem q{0, 4, 2, {}};
  const auto r = run(q);
  EXPECT_EQ(r.counts, std::vector<int64_t>(4, 0));
  EXPECT_EQ(r.score_sums, std::vector<double>(4, 0));
  EXPECT_EQ(r.group_tokens, std::vector<int64_t>{0});
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, GateKernel,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

}  // namespace
}  // namespace torch_routers
