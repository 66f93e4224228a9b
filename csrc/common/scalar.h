// Scalar types, and what every formula needs that is written once for CPU and CUDA. Maths is done in
// Compute<T>; T is how numbers are stored.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TORCH_ROUTERS_HOST_DEVICE __host__ __device__
#else
#define TORCH_ROUTERS_HOST_DEVICE
#endif

namespace torch_routers {

// The unsigned and the signed integer of a scalar's size.
template <class T> struct BitsOf;
template <> struct BitsOf<float> {
  using type = std::uint32_t;
  using signed_type = std::int32_t;
};
template <> struct BitsOf<double> {
  using type = std::uint64_t;
  using signed_type = std::int64_t;
};
template <class T> using Bits = typename BitsOf<T>::type;
template <class T> using SignedBits = typename BitsOf<T>::signed_type;

// `static`, here and in the other headers: each translation unit keeps its own copy, so that the
// linker can never hand code built for AVX-512 to a kernel built for a lesser machine.
template <class To, class From>
TORCH_ROUTERS_HOST_DEVICE static inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class T> struct ComputeOf {
  using type = T;
};
template <> struct ComputeOf<BFloat16> {
  using type = float;
};
template <> struct ComputeOf<Float16> {
  using type = float;
};
template <class T> using Compute = typename ComputeOf<T>::type;

// Exact. No branches: loops over them become vectors.
TORCH_ROUTERS_HOST_DEVICE static inline float load(float value) { return value; }
TORCH_ROUTERS_HOST_DEVICE static inline double load(double value) { return value; }
TORCH_ROUTERS_HOST_DEVICE static inline float load(BFloat16 value) {
  return bit_cast<float>(std::uint32_t{value.bits} << 16);
}
TORCH_ROUTERS_HOST_DEVICE static inline float load(Float16 value) {
  const std::uint32_t sign = std::uint32_t{value.bits} << 16 & 0x80000000u;
  const std::uint32_t rest = std::uint32_t{value.bits} << 13 & 0x0fffe000u;
  // The exponents differ by 112, of subnormals too. Those of infinity and NaN are all ones.
  const auto bits = bit_cast<std::uint32_t>(bit_cast<float>(rest) * 0x1p112f);
  return bit_cast<float>(sign | bits | (rest >= 0x0f800000u ? 0x7f800000u : 0u));
}

// Rounded to the nearest, of two equally near to the even one; NaN stays NaN.
TORCH_ROUTERS_HOST_DEVICE static inline void store(float* to, float value) { *to = value; }
TORCH_ROUTERS_HOST_DEVICE static inline void store(double* to, double value) { *to = value; }
TORCH_ROUTERS_HOST_DEVICE static inline void store(BFloat16* to, float value) {
  const auto bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded);
}
TORCH_ROUTERS_HOST_DEVICE static inline void store(Float16* to, float value) {
  const auto bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Below the smallest normal, adding a half moves the subnormal to the low bits, rounded.
  const auto small = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const std::uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const std::uint32_t number = magnitude >= 0x477ff000u ? 0x7c00u : finite;  // rounds to infinity
  const std::uint32_t half = magnitude > 0x7f800000u ? 0x7e00u : number;
  to->bits = static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | half);
}

}  // namespace torch_routers
