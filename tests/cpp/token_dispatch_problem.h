// Inputs for the kernels of token_dispatch_kernel.h: small integers and powers of two, so that every
// result is exact in every type, and any order of summation gives the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <random>
#include <type_traits>
#include <vector>

#include "token_dispatch/token_dispatch_kernel.h"

namespace torch_routers {

struct DispatchCase {
  std::int64_t tokens, slots, hidden;
  std::int64_t spare = 0;  // rows without a slot, anywhere
  double empty = 0;        // share of the slots that have no row
};

inline std::ostream& operator<<(std::ostream& out, const DispatchCase& c) {
  out << c.tokens << "x" << c.slots << "_hidden_" << c.hidden << "_spare_" << c.spare;
  return out << "_empty_" << static_cast<int>(100 * c.empty);
}

template <class T> struct DispatchProblem {
  DispatchCase shape;
  std::vector<std::int64_t> order, inverse;
  std::vector<T> token, row;
  std::vector<Compute<T>> weights;  // NaN where no row is

  explicit DispatchProblem(const DispatchCase& c)
      : shape(c), inverse(c.tokens * c.slots, -1), weights(c.tokens * c.slots) {
    std::mt19937 random(static_cast<unsigned>(c.tokens + c.slots + c.hidden));
    for (std::int64_t i = 0; i < c.tokens * c.slots; ++i)
      if (random() >= c.empty * static_cast<double>(random.max())) order.push_back(i);
    order.resize(order.size() + c.spare, -1);
    std::shuffle(order.begin(), order.end(), random);
    for (std::size_t r = 0; r < order.size(); ++r)
      if (order[r] >= 0) inverse[order[r]] = static_cast<std::int64_t>(r);
    for (std::size_t i = 0; i < weights.size(); ++i)
      weights[i] = inverse[i] < 0 ? static_cast<Compute<T>>(__builtin_nan(""))
                                  : static_cast<Compute<T>>(static_cast<int>(random() % 4) - 2) / 2;
    const auto draw = [&](std::int64_t size) {
      std::vector<T> values(size);
      for (T& value : values)
        store(&value, static_cast<Compute<T>>(static_cast<int>(random() % 9) - 4));
      return values;
    };
    token = draw(c.tokens * c.hidden);
    row = draw(max_rows() * c.hidden);
  }

  std::int64_t max_rows() const { return static_cast<std::int64_t>(order.size()); }
  DispatchPlan plan(const std::int64_t* order, const std::int64_t* inverse) const {
    return {shape.tokens, shape.slots, max_rows(), shape.hidden, order, inverse};
  }
};

// What token_dispatch_kernel.h says, in loops. A slot and a row that do not name each other have none.
template <class T> struct DispatchReference {
  const DispatchProblem<T>& p;
  bool weighed;

  std::int64_t row_of(std::int64_t slot) const {
    const std::int64_t r = p.inverse[slot];
    return 0 <= r && r < p.max_rows() && p.order[r] == slot ? r : -1;
  }
  Compute<T> weight(std::int64_t slot) const { return weighed ? p.weights[slot] : 1; }

  std::vector<T> permute() const {
    std::vector<T> result(p.row.size(), T{});
    for (std::size_t i = 0; i < p.inverse.size(); ++i)
      for (std::int64_t h = 0; row_of(i) >= 0 && h < p.shape.hidden; ++h)
        store(&result[row_of(i) * p.shape.hidden + h],
              weight(i) * load(p.token[i / p.shape.slots * p.shape.hidden + h]));
    return result;
  }
  std::vector<T> combine() const {
    std::vector<Compute<T>> sums(p.token.size());
    for (std::size_t i = 0; i < p.inverse.size(); ++i)
      for (std::int64_t h = 0; row_of(i) >= 0 && h < p.shape.hidden; ++h)
        sums[i / p.shape.slots * p.shape.hidden + h] +=
            weight(i) * load(p.row[row_of(i) * p.shape.hidden + h]);
    std::vector<T> result(sums.size());
    for (std::size_t i = 0; i < sums.size(); ++i) store(&result[i], sums[i]);
    return result;
  }
  std::vector<Compute<T>> grad_weights() const {
    std::vector<Compute<T>> result(p.inverse.size());
    for (std::size_t i = 0; i < p.inverse.size(); ++i)
      for (std::int64_t h = 0; row_of(i) >= 0 && h < p.shape.hidden; ++h)
        result[i] += load(p.token[i / p.shape.slots * p.shape.hidden + h]) *
                     load(p.row[row_of(i) * p.shape.hidden + h]);
    return result;
  }
};

template <class T> std::vector<double> as_double(const std::vector<T>& values) {
  std::vector<double> result;
  for (const T& value : values) result.push_back(load(value));
  return result;
}

}  // namespace torch_routers
