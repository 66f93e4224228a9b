// exp, log, scores and the order of logits, against the C library in a wider type.
#include "common/score.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace torch_routers {
namespace {

template <class T> class Score : public testing::Test {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Score, Types);

// Distance in units in the last place of the exact result, rounded to T.
template <class T> double ulps(T actual, long double exact) {
  const T rounded = static_cast<T>(exact);
  if (actual == rounded) return 0;
  const T unit =
      std::nextafter(std::abs(rounded), std::numeric_limits<T>::infinity()) - std::abs(rounded);
  return static_cast<double>(std::abs(actual - exact) / unit);
}

// The largest distance of own(x) from exact(x) for x in [first, last] where that is a normal number.
template <class T, class Own, class Exact>
double worst_ulps(double first, double last, const Own& own, const Exact& exact) {
  double worst = 0;
  for (double x = first; x <= last; x += (last - first) / 300007) {
    const T argument = static_cast<T>(x);
    const long double value = exact(static_cast<long double>(argument));
    if (std::abs(value) >= std::numeric_limits<T>::min())
      worst = std::max(worst, ulps(own(argument), value));
  }
  return worst;
}

TYPED_TEST(Score, ExpIsWithinTwoUnits) {
  using T = TypeParam;
  const double lowest = std::log(std::numeric_limits<T>::min()), step = -lowest / 200003;
  double worst = 0;
  for (double x = lowest; x <= 0; x += step) {
    const T argument = static_cast<T>(x);
    worst = std::max(worst, ulps(own_exp(argument), std::exp(static_cast<long double>(argument))));
  }
  EXPECT_LT(worst, 2);
  EXPECT_EQ(own_exp(T{0}), T{1});
}

TYPED_TEST(Score, ExpOfWhatIsNoOrdinaryNumber) {
  using T = TypeParam;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  EXPECT_EQ(own_exp(-kInfinity), T{0});
  EXPECT_EQ(own_exp(kInfinity), kInfinity);
  EXPECT_EQ(own_exp(T{-1e30f}), T{0});
  EXPECT_EQ(own_exp(T{1e30f}), kInfinity);
  EXPECT_TRUE(std::isnan(own_exp(std::numeric_limits<T>::quiet_NaN())));
  const T subnormal = static_cast<T>(std::log(std::numeric_limits<T>::min()) - 3);
  EXPECT_NEAR(own_exp(subnormal) / std::exp(subnormal), 1, 1e-4);
}

TYPED_TEST(Score, LogIsWithinTwoUnits) {
  using T = TypeParam;
  using Limits = std::numeric_limits<T>;
  const auto own = [](T x) { return own_log(x); };
  const auto exact = [](long double x) { return std::log(x); };
  const double epsilon = Limits::epsilon(), factor = sizeof(T) == 4 ? 1.0003 : 1.003;
  double worst = 0;
  for (double x = Limits::min(); x <= Limits::max(); x *= factor) {
    const T argument = static_cast<T>(x);
    worst = std::max(worst, ulps(own(argument), exact(argument)));
  }
  EXPECT_LT(worst, 2);
  EXPECT_LT((worst_ulps<T>(0.5, 2, own, exact)), 2);
  EXPECT_LT((worst_ulps<T>(1 - 1e5 * epsilon, 1 + 1e5 * epsilon, own, exact)), 2);
  for (const T x :
       {Limits::min(), Limits::max(), std::nextafter(T{1}, T{0}), std::nextafter(T{1}, T{2})})
    EXPECT_LT(ulps(own(x), exact(x)), 2) << x;
}

TYPED_TEST(Score, LogOfWhatIsNoOrdinaryNumber) {
  using T = TypeParam;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  EXPECT_EQ(own_log(T{1}), T{0});
  EXPECT_EQ(own_log(kInfinity), kInfinity);
  EXPECT_TRUE(std::isnan(own_log(std::numeric_limits<T>::quiet_NaN())));
}

TYPED_TEST(Score, Expm1IsWithinTwoUnits) {
  using T = TypeParam;
  using Limits = std::numeric_limits<T>;
  const auto own = [](T x) { return own_expm1(x); };
  const auto exact = [](long double x) { return std::expm1(x); };
  const double lowest = std::log(Limits::min()), highest = std::log(Limits::max());
  for (const auto& [first, last] :
       {std::pair(lowest, highest), std::pair(-2.0, 2.0), std::pair(-1e-3, 1e-3)})
    EXPECT_LT((worst_ulps<T>(first, last, own, exact)), 2) << first;
  for (T x = 1; x > 0; x *= T{0.3f})  // down to the smallest of all
    for (const T argument : {x, -x}) {
      EXPECT_LT(ulps(own(argument), exact(argument)), 2) << argument;
    }
}

TYPED_TEST(Score, Expm1OfWhatIsNoOrdinaryNumber) {
  using T = TypeParam;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  EXPECT_EQ(own_expm1(T{0}), T{0});
  EXPECT_EQ(own_expm1(-kInfinity), T{-1});
  EXPECT_EQ(own_expm1(T{-1e30f}), T{-1});
  EXPECT_TRUE(std::isnan(own_expm1(std::numeric_limits<T>::quiet_NaN())));
}

long double exact_sigmoid(long double x) { return 1 / (1 + std::exp(-x)); }
long double exact_sqrt_softplus(long double x) {
  return std::sqrt((x > 0 ? x : 0) + std::log1p(std::exp(x < 0 ? x : -x)));
}

TYPED_TEST(Score, Log1pIsWithinFourUnits) {
  using T = TypeParam;
  const auto own = [](T u) { return own_log1p(u); };
  const auto exact = [](long double u) { return std::log1p(u); };
  EXPECT_LE((worst_ulps<T>(0, 1, own, exact)), 4);
  EXPECT_LE((worst_ulps<T>(0, 1e-6, own, exact)), 4);
  EXPECT_EQ(own_log1p(T{0}), T{0});
}

TYPED_TEST(Score, ScoresAndTheirSlopesAreWithinFourUnits) {
  using T = TypeParam;
  const double lowest = 2 * std::log(std::numeric_limits<T>::min());
  for (const auto& [first, last] :
       {std::pair(lowest, 200.0), std::pair(-50.0, 50.0), std::pair(-1.0, 1.0)}) {
    SCOPED_TRACE(first);
    EXPECT_LE((worst_ulps<T>(first, last, [](T x) { return sigmoid(x); }, exact_sigmoid)), 4);
    EXPECT_LE((worst_ulps<T>(
                  first, last, [](T x) { return sigmoid_slope(x); },
                  [](long double x) { return exact_sigmoid(x) * exact_sigmoid(-x); })),
              4);
    EXPECT_LE(
        (worst_ulps<T>(first, last, [](T x) { return sqrt_softplus(x); }, exact_sqrt_softplus)), 4);
    EXPECT_LE((worst_ulps<T>(
                  first, last, [](T x) { return sqrt_softplus_slope(x); },
                  [](long double x) { return exact_sigmoid(x) / (2 * exact_sqrt_softplus(x)); })),
              4);
  }
}

TYPED_TEST(Score, ScoresOfWhatIsNoOrdinaryNumber) {
  using T = TypeParam;
  constexpr T kInfinity = std::numeric_limits<T>::infinity(),
              kNan = std::numeric_limits<T>::quiet_NaN();
  EXPECT_EQ(sigmoid(-kInfinity), T{0});
  EXPECT_EQ(sigmoid(kInfinity), T{1});
  EXPECT_EQ(sqrt_softplus(-kInfinity), T{0});
  EXPECT_EQ(sqrt_softplus(kInfinity), kInfinity);
  for (const T x : {-kInfinity, kInfinity}) {
    EXPECT_EQ(sigmoid_slope(x), T{0});
    EXPECT_EQ(sqrt_softplus_slope(x), T{0});
  }
  EXPECT_TRUE(std::isnan(sigmoid(kNan)) && std::isnan(sigmoid_slope(kNan)));
  EXPECT_TRUE(std::isnan(sqrt_softplus(kNan)) && std::isnan(sqrt_softplus_slope(kNan)));
}

TYPED_TEST(Score, KeysRankAsLogitsDo) {
  using T = TypeParam;
  using Limits = std::numeric_limits<T>;
  const std::vector<T> ascending = {
      -Limits::infinity(),  Limits::lowest(),      -1,
      -Limits::min(),       -Limits::denorm_min(), 0,
      Limits::denorm_min(), Limits::min(),         1,
      Limits::max(),        Limits::infinity(),    Limits::quiet_NaN()};
  EXPECT_GT(rank_key(ascending[0]), 0u);  // 0 stands for "none"
  for (std::size_t i = 1; i < ascending.size(); ++i)
    EXPECT_LT(rank_key(ascending[i - 1]), rank_key(ascending[i])) << i;
  EXPECT_EQ(rank_key(T{0}), rank_key(-T{0}));
  EXPECT_EQ(rank_key(Limits::quiet_NaN()), rank_key(-Limits::quiet_NaN()));
}

}  // namespace
}  // namespace torch_routers
