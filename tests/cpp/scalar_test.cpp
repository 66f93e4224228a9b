// The 16-bit types, for every one of their values.
#include "common/scalar.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace torch_routers {
namespace {

// What the bits of a number mean: sign, `exponent` bits of exponent, `fraction` bits of fraction.
double meaning(std::uint16_t bits, int exponent, int fraction) {
  const int bias = (1 << (exponent - 1)) - 1, most = (1 << exponent) - 1;
  const int e = bits >> fraction & most, f = bits & ((1 << fraction) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (e == most) return f ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (e == 0) return sign * std::ldexp(f, 1 - bias - fraction);
  return sign * std::ldexp((1 << fraction) + f, e - bias - fraction);
}

template <class T> std::uint16_t stored(float value) {
  T result;
  store(&result, value);
  return result.bits;
}

template <class T> void check_all(int exponent, int fraction) {
  const std::uint16_t infinity = ((1 << exponent) - 1) << fraction;
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const T half{static_cast<std::uint16_t>(bits)};
    const double value = meaning(half.bits, exponent, fraction);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(load(half))) << bits;
      EXPECT_TRUE(std::isnan(load(T{stored<T>(load(half))}))) << bits;
      continue;
    }
    ASSERT_EQ(load(half), value) << bits;
    ASSERT_EQ(std::signbit(load(half)), std::signbit(value)) << bits;
    ASSERT_EQ(stored<T>(load(half)), bits);

    // The middle to the next number goes to the even one, its neighbours to the nearer.
    const auto next = static_cast<std::uint16_t>(bits + 1);
    if ((bits & 0x7fff) == infinity) continue;
    const double above = (next & 0x7fff) == infinity
                             ? std::ldexp(value > 0 ? 1.0 : -1.0, 1 << (exponent - 1))
                             : meaning(next, exponent, fraction);
    const auto middle = static_cast<float>((value + above) / 2);
    ASSERT_EQ(stored<T>(middle), bits % 2 ? next : bits) << middle;
    ASSERT_EQ(stored<T>(std::nextafter(middle, static_cast<float>(value))), bits) << middle;
    const auto outward = std::copysign(std::numeric_limits<float>::infinity(), middle);
    ASSERT_EQ(stored<T>(std::nextafter(middle, outward)), next) << middle;
  }
  EXPECT_EQ(stored<T>(-3.4028235e38f), infinity | 0x8000);
}

TEST(Scalar, BFloat16) { check_all<BFloat16>(8, 7); }
TEST(Scalar, Float16) { check_all<Float16>(5, 10); }

}  // namespace
}  // namespace torch_routers
