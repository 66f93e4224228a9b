// What fuzz targets share: sizes and values from bytes, and arrays of exactly the size asked for, so
// that AddressSanitizer sees each step out of them.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>

#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers::fuzz {

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "expected %s\n", what);
  std::abort();
}

// Where there are no elements it is at null, as torch's tensors are.
template <class T> class Array {
 public:
  explicit Array(std::int64_t size, unsigned char fill = 0)
      : size_(size), data_(size ? new T[size] : nullptr) {
    if (size) std::memset(static_cast<void*>(data_.get()), fill, size * sizeof(T));
  }
  std::int64_t size() const { return size_; }
  T* data() const { return data_.get(); }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }
  T& operator[](std::int64_t i) const { return data_[i]; }

  // Equal to the bit, but for the payloads of NaN, which no IEEE operation decides.
  bool operator==(const Array& other) const {
    return std::equal(begin(), end(), other.begin(), other.end(), [](const T& a, const T& b) {
      if (std::memcmp(&a, &b, sizeof(T)) == 0) return true;
      if constexpr (std::is_integral_v<T>)
        return false;
      else
        return load(a) != load(a) && load(b) != load(b);
    });
  }

 private:
  std::int64_t size_;
  std::unique_ptr<T[]> data_;
};

template <class T> T* data(const std::optional<Array<T>>& array) {
  return array ? array->data() : nullptr;
}

// body(begin, end) on two parts of [0, count), the latter first; not where there is nothing.
template <class Body> void in_parts(double cut, std::int64_t count, const Body& body) {
  const auto middle = static_cast<std::int64_t>(cut * static_cast<double>(count));
  if (middle < count) body(middle, count);
  if (middle > 0) body(0, middle);
}

// What outputs and scratch hold before a run. A kernel runs twice, with one and with the other: a
// byte that it does not write, or a result that depends on one, makes the results differ.
constexpr unsigned char kFills[2] = {0xA5, 0x5A};

// Where the input is too short it goes on pseudo-random, by a seed in it: else most runs would be of
// nothing but zeros.
class Bytes : public FuzzedDataProvider {
 public:
  Bytes(const std::uint8_t* data, std::size_t size)
      : FuzzedDataProvider(data, size), seed_(ConsumeIntegral<std::uint32_t>()) {}

  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return remaining_bytes() ? ConsumeIntegralInRange(low, high)
                             : low + random() % (high - low + 1);
  }
  // Often small, where the special cases are.
  std::int64_t size(std::int64_t low, std::int64_t high) {
    return integer(low, integer(0, 3) ? std::min(high, low + 9) : high);
  }
  bool flag() { return integer(0, 1); }
  double share() { return static_cast<double>(integer(0, 100)) / 100; }

  // Calls body.operator()<T>() with one of the types of stored numbers.
  template <class Body> void pick_type(const Body& body) {
    switch (integer(0, 3)) {
      case 0: return body.template operator()<float>();
      case 1: return body.template operator()<double>();
      case 2: return body.template operator()<BFloat16>();
      default: return body.template operator()<Float16>();
    }
  }

  // The same with the types that are computed in.
  template <class Body> void pick_compute_type(const Body& body) {
    if (flag())
      body.template operator()<float>();
    else
      body.template operator()<double>();
  }

  // One that this machine has.
  Isa any_isa() { return static_cast<Isa>(integer(0, static_cast<std::int64_t>(isa()))); }

  Array<std::int64_t> integers(std::int64_t size, std::int64_t low, std::int64_t high) {
    Array<std::int64_t> result(size);
    const Array<std::uint8_t> raw = bytes(size);
    for (std::int64_t i = 0; i < size; ++i) result[i] = low + raw[i] % (high - low + 1);
    return result;
  }

  Array<bool> flags(std::int64_t size) {
    Array<bool> result(size);
    const Array<std::uint8_t> raw = bytes(size);
    for (std::int64_t i = 0; i < size; ++i) result[i] = raw[i] & 1;
    return result;
  }

  // [size + 1], ascending from 0 to `end`.
  Array<std::int64_t> offsets(std::int64_t size, std::int64_t end) {
    Array<std::int64_t> result(size + 1);
    const Array<std::uint8_t> raw = bytes(size);
    for (std::int64_t i = 1; i < size; ++i) result[i] = raw[i] * (end + 1) / 256;
    result[size] = end;
    std::sort(result.begin(), result.end());
    return result;
  }

  // By kind: any bits; multiples of 1/8 in [-16, 16), many of them equal; what is special.
  std::int64_t kind() { return integer(0, 2); }
  template <class T> Array<T> numbers(std::int64_t size, std::int64_t kind) {
    Array<T> result(size);
    if (size == 0) return result;
    if (kind == 0) {
      const Array<std::uint8_t> raw = bytes(size * sizeof(T));
      std::memcpy(static_cast<void*>(result.data()), raw.data(), raw.size());
      return result;
    }
    using Limits = std::numeric_limits<Compute<T>>;
    constexpr Compute<T> kSpecial[] = {0,
                                       Compute<T>(-0.0),
                                       1,
                                       -1,
                                       Limits::infinity(),
                                       -Limits::infinity(),
                                       Limits::quiet_NaN(),
                                       Limits::denorm_min(),
                                       -Limits::min(),
                                       Limits::max(),
                                       Limits::lowest(),
                                       88,
                                       -104,
                                       1e4,
                                       -1e4};
    const Array<std::uint8_t> raw = bytes(size);
    for (std::int64_t i = 0; i < size; ++i)
      store(&result[i], kind == 1 ? static_cast<std::int8_t>(raw[i]) / Compute<T>(8)
                                  : kSpecial[raw[i] % std::size(kSpecial)]);
    return result;
  }

 private:
  Array<std::uint8_t> bytes(std::int64_t size) {
    Array<std::uint8_t> result(size);
    for (std::int64_t i = size ? ConsumeData(result.data(), size) : 0; i < size; ++i)
      result[i] = random();
    return result;
  }
  std::uint32_t random() {
    seed_ = seed_ * 1664525u + 1013904223u;
    return seed_ >> 16;
  }

  std::uint32_t seed_;
};

// Runs a problem at once by the scalar code, and in two parts by that of an instruction set: to the
// same bits, which `check` looks at.
template <class Inputs, class Results, class Check>
void run_twice(Bytes& bytes, const Check& check) {
  const Isa other = bytes.any_isa();
  const double cut = bytes.share();
  const Inputs in(bytes);
  const Results out(in, Isa::Default, 1, kFills[0]);
  expect(out == Results(in, other, cut, kFills[1]), "equal results of both runs");
  check(in, out);
}

}  // namespace torch_routers::fuzz
