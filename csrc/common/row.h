// Reductions over the elements of a row on the CPU, in an order that no instruction set changes:
// as many running results as the widest vector has floats, then a tree.
#pragma once

#include <cstdint>

#include "common/vector.h"

namespace torch_routers {

constexpr int kLanes = 16;

// combine(... combine(start, term(0)) ..., term(size - 1)), regrouped.
template <class T, class Combine, class Term>
static inline T reduce_row(std::int64_t size, T start, const Combine& combine, const Term& term) {
  T lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = start;
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = combine(lanes[l], term(i + l));
  for (int l = 0; i + l < size; ++l) lanes[l] = combine(lanes[l], term(i + l));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = combine(lanes[l], lanes[l + half]);
  return lanes[0];
}

template <class T, class Term> static inline T sum_row(std::int64_t size, const Term& term) {
  return reduce_row(size, T{0}, [](T a, T b) { return a + b; }, term);
}

// The same of term.operator()<V>(i), the elements from i on: a vector of them, or one.
template <class T, class Term> static inline T sum_vectors(std::int64_t size, const Term& term) {
  Vector<T> sums[kLanes / kWidth<T>] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int part = 0; part < kLanes / kWidth<T>; ++part)
      sums[part] += term.template operator()<Vector<T>>(i + part * kWidth<T>);
  T lanes[kLanes];
  memcpy(lanes, sums, sizeof lanes);
  for (int l = 0; i + l < size; ++l) lanes[l] += term.template operator()<T>(i + l);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// body.operator()<V>(i) for all elements, vectors of them and then one by one.
template <class T, class Body>
static inline void each_of_row(std::int64_t size, const Body& body) {
  std::int64_t i = 0;
  for (; i + kWidth<T> <= size; i += kWidth<T>) body.template operator()<Vector<T>>(i);
  for (; i < size; ++i) body.template operator()<T>(i);
}

// The largest term; NaN is passed over.
template <class T, class Term>
static inline T max_row(std::int64_t size, T lowest, const Term& term) {
  return reduce_row(size, lowest, [](T a, T b) { return b > a ? b : a; }, term);
}

}  // namespace torch_routers
