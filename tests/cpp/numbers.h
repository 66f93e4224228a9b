// Numbers of the types that kernels work on, for tests that compare them with loops in double.
#pragma once

#include <cstddef>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "common/scalar.h"

namespace torch_routers {

template <class T> T number(double value) {
  T result;
  store(&result, static_cast<Compute<T>>(value));
  return result;
}

// Half of the last bit of a number near 1.
template <class T> double rounding() {
  return std::is_same_v<T, double>     ? 0x1p-53
         : std::is_same_v<T, float>    ? 0x1p-24
         : std::is_same_v<T, BFloat16> ? 0x1p-8
                                       : 0x1p-11;
}

template <class T> std::vector<T> random_numbers(std::size_t size, unsigned seed) {
  std::vector<T> values(size);
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  for (T& value : values) value = number<T>(normal(random));
  return values;
}

template <class T> std::vector<char> bits(const std::vector<T>& values) {
  std::vector<char> bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

}  // namespace torch_routers
