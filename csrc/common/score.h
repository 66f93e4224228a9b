// Scores of single logits: the order in which they rank, and exp and log.
//
// exp and log are written out, in IEEE operations of one fixed sequence, for three reasons: the
// same bits on every instruction set and C library, a loop over exp that the compiler vectorises,
// and no symbol of a recent libm in the library.
#pragma once

#include "common/scalar.h"

namespace torch_routers {

// An integer that ranks a logit: the larger the logit, the larger its key; 0 and -0 have one key.
// Every NaN has the largest, so that a row with a NaN has NaN weights and is noticed. No logit has
// the key 0, which thus stands for "none". Of equal keys the lower index comes first.
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline Bits<T> rank_key(T logit) {
  constexpr Bits<T> kSign = Bits<T>{1} << (8 * sizeof(T) - 1);
  const auto bits = bit_cast<Bits<T>>(logit + T{0});  // -0 becomes 0
  const Bits<T> key = bits & kSign ? ~bits : bits | kSign;
  return logit != logit ? ~Bits<T>{0} : key;
}

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r. 2^n is applied in two steps, so that
// results may be subnormal.
template <class T> struct ExpParts {
  T less_one;     // e^r - 1
  T scale, rest;  // 2^n = scale * rest
};
TORCH_ROUTERS_HOST_DEVICE static inline ExpParts<float> exp_parts(float x) {
  constexpr float kRound = 0x1.8p23f;  // added and subtracted again, it rounds to an integer
  x = x < -104.0f ? -104.0f : x;       // NaN passes both
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 0x1.715476p+0f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
  float p = 0x1.6d117cp-10f;  // minimax: relative error below 2^-26
  p = p * r + 0x1.120be2p-7f;
  p = p * r + 0x1.555518p-5f;
  p = p * r + 0x1.5554dcp-3f;
  p = p * r + 0.5f;
  const std::uint32_t power = bit_cast<std::uint32_t>(shifted) - bit_cast<std::uint32_t>(kRound);
  const std::uint32_t half = static_cast<std::uint32_t>(static_cast<std::int32_t>(power) >> 1);
  const auto scale = [](std::uint32_t k) { return bit_cast<float>((k + 127u) << 23); };
  return {p * r * r + r, scale(half), scale(power - half)};
}
TORCH_ROUTERS_HOST_DEVICE static inline ExpParts<double> exp_parts(double x) {
  constexpr double kRound = 0x1.8p52;
  x = x < -746.0 ? -746.0 : x;
  x = x > 710.0 ? 710.0 : x;
  const double shifted = x * 0x1.71547652b82fep+0 + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800.0;  // Taylor to r^13: the next term is below 2^-58
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  const std::uint64_t power = bit_cast<std::uint64_t>(shifted) - bit_cast<std::uint64_t>(kRound);
  const std::uint64_t half = ((power + 4096u) >> 1) - 2048u;  // no AVX2 shift keeps a sign
  const auto scale = [](std::uint64_t k) { return bit_cast<double>((k + 1023u) << 52); };
  return {p * r * r + r, scale(half), scale(power - half)};
}

// e^x, within 1.5 units in the last place where the result is normal.
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T own_exp(T x) {
  const ExpParts<T> parts = exp_parts(x);
  return (parts.less_one + T{1}) * parts.scale * parts.rest;
}
// e^x - 1 where e^x does not overflow, with the digits of small x.
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T own_expm1(T x) {
  const ExpParts<T> parts = exp_parts(x);
  const T scale = parts.scale * parts.rest;
  return scale * parts.less_one + (scale - T{1});
}

// ln x of a normal x > 0, infinity or NaN, by x = 2^n m, m in [sqrt(1/2), sqrt 2), and
// ln m = 2 atanh((m - 1) / (m + 1)).
TORCH_ROUTERS_HOST_DEVICE static inline double own_log(double x) {
  constexpr std::uint64_t kHalf = std::uint64_t{0x3fe6a09e667f3bcd};  // sqrt(1/2)
  constexpr std::uint64_t kOffset = std::uint64_t{1024} << 52, kTwo52 = std::uint64_t{1075} << 52;
  const auto bits = bit_cast<std::uint64_t>(x);
  const std::uint64_t power = (bits - kHalf + kOffset) >> 52;  // n + 1024
  const auto n = bit_cast<double>(power | kTwo52) - (0x1p52 + 1024.0);
  const auto m = bit_cast<double>(bits - (power << 52) + kOffset);
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 21.0;
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  const double tail = 2.0 * s * z * p + n * 0x1.a39ef35793c76p-33;
  const double result = n * 0x1.62e42fee00000p-1 + (2.0 * s + tail);
  return x < __builtin_huge_val() ? result : x;
}
TORCH_ROUTERS_HOST_DEVICE static inline float own_log(float x) {
  constexpr std::uint32_t kHalf = 0x3f3504f3;
  const auto bits = bit_cast<std::uint32_t>(x);
  const auto power = static_cast<std::int32_t>(bits - kHalf) >> 23;
  const auto n = static_cast<float>(power);
  const auto m = bit_cast<float>(bits - (static_cast<std::uint32_t>(power) << 23));
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  float p = 1.0f / 9.0f;
  p = p * z + 1.0f / 7.0f;
  p = p * z + 1.0f / 5.0f;
  p = p * z + 1.0f / 3.0f;
  const float tail = 2.0f * s * z * p + n * -0x1.bd0106p-13f;
  const float result = n * 0x1.63p-1f + (2.0f * s + tail);
  return x < __builtin_huge_valf() ? result : x;
}

// ln(1 + u) for u in [0, 1], as 2 atanh(u / (2 + u)).
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T own_log1p(T u) {
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 18;  // the next is below a quarter of a unit
  const T s = u / (T{2} + u), z = s * s;
  T p = T{1} / T{2 * kTerms - 1};
  for (int k = 2 * kTerms - 3; k >= 3; k -= 2) p = p * z + T{1} / static_cast<T>(k);
  return T{2} * s * z * p + T{2} * s;
}

TORCH_ROUTERS_HOST_DEVICE static inline float own_sqrt(float x) { return __builtin_sqrtf(x); }
TORCH_ROUTERS_HOST_DEVICE static inline double own_sqrt(double x) { return __builtin_sqrt(x); }

// 1 / (1 + e^-x) and its derivative, without overflow.
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T sigmoid(T x) {
  const T e = own_exp(x < 0 ? x : -x);
  return (x < 0 ? e : T{1}) / (T{1} + e);
}
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T sigmoid_slope(T x) {
  const T e = own_exp(x < 0 ? x : -x);
  return e / ((T{1} + e) * (T{1} + e));
}

// sqrt(ln(1 + e^x)) and its derivative. Where e^x is next to nothing, ln(1 + e^x) is e^x, whose root
// does not run out of exponents.
template <class T> constexpr T kSmallSoftplus = sizeof(T) == 4 ? -20 : -40;
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T sqrt_softplus(T x) {
  const T root = own_exp(x * T{0.5});
  const T softplus = (x > 0 ? x : T{0}) + own_log1p(own_exp(x < 0 ? x : -x));
  return x < kSmallSoftplus<T> ? root : x != x ? x : own_sqrt(softplus);
}
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T sqrt_softplus_slope(T x) {
  const T value = sqrt_softplus(x);
  return T{0.5} * (x < kSmallSoftplus<T> ? value : sigmoid(x) / value);
}

}  // namespace torch_routers
