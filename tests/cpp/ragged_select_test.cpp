// The CPU kernel of ragged_select on every instruction set: what ragged_select_kernel.h says, and
// the same bits everywhere. Memory is exact, for the sanitizers.
#include "ragged_select/ragged_select_kernel.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "ragged_select_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;
using Indices = std::vector<int64_t>;
constexpr RaggedRule kRules[] = {RaggedRule::TopP, RaggedRule::Entropy, RaggedRule::Confidence,
                                 RaggedRule::Positive};
constexpr Crossing kCrossings[] = {Crossing::Below, Crossing::Reaching, Crossing::Exceeding};
// Of tiles up to the largest, and of rows.
constexpr int64_t kExperts[] = {1, 2, 7, 21, 64, 512, 513, 600};

class RaggedSelectKernel : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }

  // In ranges of `step` tokens.
  template <class T> Indices run(const RaggedProblem<T>& problem, int64_t step = 1000000) {
    return run_on(GetParam(), problem, step);
  }
  template <class T>
  static Indices run_on(Isa isa, const RaggedProblem<T>& problem, int64_t step = 1000000) {
    return problem.template run<HostArray>([&](const auto& params, int64_t tokens) {
      for (int64_t t = 0; t < tokens; t += step)
        TORCH_ROUTERS_PICK_ISA(isa, ragged_select(params, t, std::min(t + step, tokens)));
    });
  }

  // How many experts the only token of a problem keeps; they are the first ones of its order.
  template <class T> int64_t kept(const RaggedProblem<T>& problem) {
    const Indices indices = run(problem);
    const int64_t count = std::find(indices.begin(), indices.end(), -1) - indices.begin();
    for (int64_t j = 0; j < problem.slots; ++j)
      EXPECT_EQ(indices[j], j < count ? problem.order[j] : -1) << j;
    return count;
  }
};

std::vector<double> logs(std::vector<double> probabilities) {
  for (double& p : probabilities) p = std::log(p);
  return probabilities;
}

template <class T> T above(T x) { return std::nextafter(x, std::numeric_limits<T>::infinity()); }
template <class T> T below(T x) { return std::nextafter(x, -std::numeric_limits<T>::infinity()); }

// Both are long doubles of one row of logits.
template <class T> std::vector<long double> exact_softmax(const T* logits, int64_t experts) {
  std::vector<long double> p(logits, logits + experts);
  const long double max = *std::max_element(p.begin(), p.end());
  for (long double& x : p) x = std::exp(x - max);
  const long double sum = std::accumulate(p.begin(), p.end(), 0.0L);
  for (long double& x : p) x /= sum;
  return p;
}
long double exact_entropy(const std::vector<long double>& p) {
  long double sum = 0;
  for (const long double x : p) sum -= x == 0 ? 0 : x * std::log(x);
  return sum;
}

TEST_P(RaggedSelectKernel, KeepsWhatTheRuleSays) {
  RaggedProblem<double> problem(logs({.2, .5, .05, .25}));
  EXPECT_EQ(problem.order, (Indices{1, 3, 0, 2}));
  const auto by_top_p = [&](double top_p, Crossing crossing) {
    problem.top_p = top_p;
    problem.crossing = crossing;
    return kept(problem);
  };
  for (const auto& [top_p, fitting] :
       {std::pair{0.3, 0}, {0.6, 1}, {0.8, 2}, {0.96, 3}}) {  // sums: 0.5, 0.75, 0.95, 1
    problem.least = 0;
    EXPECT_EQ(by_top_p(top_p, Crossing::Below), fitting);
    EXPECT_EQ(by_top_p(top_p, Crossing::Reaching), fitting + 1);
    EXPECT_EQ(by_top_p(top_p, Crossing::Exceeding), fitting + 1);
  }
  for (const Crossing crossing : kCrossings) EXPECT_EQ(by_top_p(2, crossing), 4);
  const auto by_steps = [&](RaggedRule rule, const std::vector<double>& thresholds) {
    problem.rule = rule;
    problem.thresholds = thresholds;
    problem.counts = {3, 1, 4, 2};
    problem.counts.resize(thresholds.size() + 1);
    return kept(problem);
  };
  EXPECT_EQ(by_steps(RaggedRule::Entropy, {}), 3);  // it is 1.1647
  EXPECT_EQ(by_steps(RaggedRule::Entropy, {1.17}), 3);
  EXPECT_EQ(by_steps(RaggedRule::Entropy, {1.16}), 1);
  EXPECT_EQ(by_steps(RaggedRule::Entropy, {0.5, 1.16, 1.17}), 4);
  EXPECT_EQ(by_steps(RaggedRule::Entropy, {0, 0.5, 1.16}), 2);
  EXPECT_EQ(by_steps(RaggedRule::Confidence, {}), 3);
  EXPECT_EQ(by_steps(RaggedRule::Confidence, {0.6}), 3);
  EXPECT_EQ(by_steps(RaggedRule::Confidence, {0.3, 0.4, 0.6}), 4);
  problem = RaggedProblem<double>({-1, 3, 0, 1e-300, -0.0, 2});
  problem.rule = RaggedRule::Positive;
  problem.least = 0;
  EXPECT_EQ(kept(problem), 3);
}

// Of equal logits each probability is exactly 1 / E.
TEST_P(RaggedSelectKernel, ASumOfExactlyTopPCrossesAsTheRuleSays) {
  const auto check = [&]<class T>(T half) {
    for (const int experts : {8, 64, 1024}) {
      RaggedProblem<T> problem{std::vector<T>(experts)};
      problem.least = 0;
      const auto by_crossing = [&](T top_p) {
        problem.top_p = top_p;
        Indices counts;
        for (const Crossing crossing : kCrossings) {
          problem.crossing = crossing;
          counts.push_back(kept(problem));
        }
        return counts;
      };
      const int64_t k = experts / 2;
      EXPECT_EQ(by_crossing(half), (Indices{k, k, k + 1}));
      EXPECT_EQ(by_crossing(below(half)), (Indices{k - 1, k, k}));
      EXPECT_EQ(by_crossing(above(half)), (Indices{k, k + 1, k + 1}));
      EXPECT_EQ(by_crossing(0), (Indices{0, 0, 1}));
      EXPECT_EQ(by_crossing(1), (Indices{experts, experts, experts}));
    }
  };
  check(0.5f);
  check(0.5);
}

TEST_P(RaggedSelectKernel, KeepsTheLowerIndexOfEquals) {
  RaggedProblem<float> problem({1, 0, 1, 0, 1, 0});
  problem.rule = RaggedRule::Confidence;
  problem.counts = {4};
  EXPECT_EQ(run(problem), (Indices{0, 2, 4, 1, -1, -1}));
}

TEST_P(RaggedSelectKernel, AThresholdThatIsReachedExactlyCounts) {
  const auto check = [&]<class T>(T) {
    for (const int experts : {8, 1024}) {
      RaggedProblem<T> problem{std::vector<T>(experts)};
      for (const auto& [rule, value] :
           {std::pair{RaggedRule::Confidence, 1.0 / experts},
            {RaggedRule::Entropy, own_log(static_cast<double>(experts))}}) {
        problem.rule = rule;
        problem.counts = {5, 2};
        problem.thresholds = {value};
        EXPECT_EQ(kept(problem), 2);
        problem.thresholds = {above(value)};
        EXPECT_EQ(kept(problem), 5);
        problem.counts = {5, 2, 6, 4, 1};
        problem.thresholds = {below(value), value, value, above(value)};
        EXPECT_EQ(kept(problem), 4);
      }
    }
  };
  check(float{});
  check(double{});
}

TEST_P(RaggedSelectKernel, KeepsTheLeastAndNoMoreThanThereAreSlots) {
  RaggedProblem<float> problem({2, 1, 0, -1});
  problem.slots = 3;
  problem.sort();
  for (const RaggedRule rule : kRules)
    for (const int64_t least : {0, 1, 2, 3, 9}) {
      problem.rule = rule;
      problem.least = least;
      problem.top_p = 0.1;
      problem.counts = {1};
      const int64_t without = rule == RaggedRule::Positive ? 2 : 1;
      EXPECT_EQ(kept(problem), std::min<int64_t>(3, std::max(least, without)));
    }
  problem.least = 1;
  problem.rule = RaggedRule::Entropy;
  problem.counts = {7};
  EXPECT_EQ(kept(problem), 3);
}

TEST_P(RaggedSelectKernel, ASlotWithoutAnExpertStaysSo) {
  RaggedProblem<float> problem({2, 1, 4, 3});
  problem.top_p = 2;
  problem.counts = {4};
  for (const int64_t least : {0, 4})
    for (const RaggedRule rule : kRules) {
      problem.rule = rule;
      problem.least = least;
      for (const Indices& order : {Indices{-1, -1, -1, -1}, Indices{2, 3, -1, -1}}) {
        problem.order = order;
        EXPECT_EQ(run(problem), order);
      }
    }
}

TEST_P(RaggedSelectKernel, RowsThatAreNotFinite) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const int64_t experts : {5, 600}) {
    RaggedProblem<float> problem(40, experts, 5);
    problem.thresholds = {0.0};
    problem.counts = {3, 2};
    problem.sort();
    const auto row = [&](int64_t t) { return problem.logits.begin() + t * experts; };
    const RaggedProblem<float> plain = problem;
    row(3)[4] = std::numeric_limits<float>::quiet_NaN();
    row(4)[1] = kInfinity;
    std::fill(row(17), row(18), -kInfinity);
    std::fill(row(18), row(19), std::numeric_limits<float>::quiet_NaN());
    std::fill(row(19), row(20) - 1, -kInfinity);
    row(19)[experts - 1] = -1;  // certain
    problem.sort();
    for (const RaggedRule rule : kRules)
      for (const Crossing crossing : kCrossings) {
        RaggedProblem<float> other = plain;
        other.rule = problem.rule = rule;
        other.crossing = problem.crossing = crossing;
        other.least = problem.least = 0;
        const Indices indices = run(problem), expected = run(other);
        const bool by_steps = rule == RaggedRule::Entropy || rule == RaggedRule::Confidence;
        for (int64_t t = 0; t < 40; ++t) {
          const Indices got(indices.begin() + 5 * t, indices.begin() + 5 * (t + 1));
          if (t != 3 && t != 4 && (t < 17 || t > 19)) {
            EXPECT_EQ(got, Indices(expected.begin() + 5 * t, expected.begin() + 5 * (t + 1)));
            continue;
          }
          int64_t count = by_steps ? 3 : 0;
          if (t == 4 && rule == RaggedRule::Positive)
            count = std::count_if(row(4), row(5), [](float z) { return z > 0; });
          if (t == 19 && rule != RaggedRule::Positive)
            count = by_steps ? 2 : crossing != Crossing::Below;
          for (int64_t j = 0; j < 5; ++j)
            EXPECT_EQ(got[j], j < count ? problem.order[5 * t + j] : -1) << t << " " << j;
        }
      }
  }
}

// The numbers behind the decisions, between thresholds that are closer than they are precise.
TEST_P(RaggedSelectKernel, HasTheSameBitsAsTheDefaultNextToTheExactValues) {
  const auto check = [&]<class T>(T epsilon) {
    for (const int64_t experts : kExperts) {
      RaggedProblem<T> problem(19, experts, 1);
      constexpr int64_t kSteps = 160;
      problem.slots = kSteps;  // more than experts: how many of them are kept is what is looked at
      problem.order.assign(19 * kSteps, 0);
      problem.least = 0;
      problem.counts.resize(kSteps + 1);
      std::iota(problem.counts.begin(), problem.counts.end(), 0);
      for (const RaggedRule rule : {RaggedRule::Entropy, RaggedRule::Confidence})
        for (int64_t t = 0; t < 19; t += 3) {
          const auto p = exact_softmax(&problem.logits[t * experts], experts);
          const auto value = static_cast<double>(rule == RaggedRule::Entropy
                                                     ? exact_entropy(p)
                                                     : *std::max_element(p.begin(), p.end()));
          problem.rule = rule;
          problem.thresholds.clear();
          for (int64_t step = 0; step < kSteps; ++step)
            problem.thresholds.push_back(value + (static_cast<double>(step - kSteps / 2) / 4) *
                                                     epsilon * std::max(1.0, value));
          const Indices expected = run_on(Isa::Default, problem);
          EXPECT_EQ(run(problem), expected);
          EXPECT_EQ(run(problem, 1), expected);
          EXPECT_EQ(expected[t * kSteps], 0) << experts << ", token " << t;
          EXPECT_EQ(expected[(t + 1) * kSteps - 1], -1) << experts << ", token " << t;
        }
    }
  };
  check(std::numeric_limits<float>::epsilon());
  check(std::numeric_limits<double>::epsilon());
}

TEST_P(RaggedSelectKernel, ARangeIsWhatItsTokensAre) {
  const auto check = [&]<class T>(T epsilon) {
    for (const int64_t experts : kExperts)
      for (const RaggedRule rule : kRules)
        for (const Crossing crossing : kCrossings) {
          RaggedProblem<T> problem(37, experts, std::min<int64_t>(experts, 9));
          const auto p = exact_softmax(problem.logits.data(), experts);
          problem.rule = rule;
          problem.crossing = crossing;
          problem.thresholds = {0.25, 1, 2};
          problem.counts = {2, 1, 4, 9};
          const auto first = static_cast<double>(*std::max_element(p.begin(), p.end()));
          for (int step = -2; step <= 2; ++step) {  // about the sum of the best of the first token
            problem.top_p = first * (1 + step * static_cast<double>(epsilon));
            const Indices expected = run_on(Isa::Default, problem);
            for (const int64_t tokens : {1, 5, 16, 37})
              EXPECT_EQ(run(problem, tokens), expected) << experts << ", ranges of " << tokens;
          }
        }
  };
  check(std::numeric_limits<float>::epsilon());
  check(std::numeric_limits<double>::epsilon());
}

// An expert of logit -infinity changes nothing, but that there is one more than a tile has.
TEST_P(RaggedSelectKernel, TilesAndRowsAgree) {
  RaggedProblem<double> tile(40, 512, 30), row(40, 513, 30);
  for (int64_t t = 0; t < 40; ++t) {
    std::copy_n(&tile.logits[t * 512], 512, &row.logits[t * 513]);
    row.logits[t * 513 + 512] = -std::numeric_limits<double>::infinity();
  }
  row.order = tile.order;
  for (const RaggedRule rule : kRules) {
    tile.rule = row.rule = rule;
    tile.thresholds = row.thresholds = {0.02, 0.04, 4, 4.5, 5};
    tile.counts = row.counts = {3, 7, 2, 9, 5, 11};
    for (const double top_p : {0.05, 0.1, 0.2}) {
      tile.top_p = row.top_p = top_p;
      EXPECT_EQ(run(tile), run(row));
    }
  }
}

TEST_P(RaggedSelectKernel, NoTokensAndNoSlots) {
  EXPECT_EQ(run(RaggedProblem<float>(0, 4, 4)), Indices{});
  EXPECT_EQ(run(RaggedProblem<float>(4, 4, 0)), Indices{});
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, RaggedSelectKernel,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

}  // namespace
}  // namespace torch_routers
