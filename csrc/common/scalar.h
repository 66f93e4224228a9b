// What every formula needs that is written once for CPU and CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TORCH_ROUTERS_HOST_DEVICE __host__ __device__
#else
#define TORCH_ROUTERS_HOST_DEVICE
#endif

namespace torch_routers {

// The unsigned integer of a scalar's size.
template <class T> struct BitsOf;
template <> struct BitsOf<float> {
  using type = std::uint32_t;
};
template <> struct BitsOf<double> {
  using type = std::uint64_t;
};
template <class T> using Bits = typename BitsOf<T>::type;

// `static`, here and in the other headers: each translation unit keeps its own copy, so that the
// linker can never hand code built for AVX-512 to a kernel built for a lesser machine.
template <class To, class From>
TORCH_ROUTERS_HOST_DEVICE static inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace torch_routers
