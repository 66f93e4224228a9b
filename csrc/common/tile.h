// Rows of kLanes tokens side by side, on the CPU: tile[e][l] is element e of token l, so that nothing
// is added or compared across a vector, and what a token gets depends on its own row alone.
#pragma once

#include "common/row.h"
#include "common/scalar.h"
#include "common/vector.h"

namespace torch_routers {

template <class T> using Lanes = T[kLanes];

// f(l) for the lanes; the loop that becomes vectors.
template <class F> static inline void each_lane(const F& f) {
  for (int l = 0; l < kLanes; ++l) f(l);
}

// f(l) for every kWidth<T>th lane: those from l on are a vector.
template <class T, class F> static inline void each_vector(const F& f) {
  for (int l = 0; l < kLanes; l += kWidth<T>) f(l);
}

// result[l] = the sum over the columns of term(e, l), a vector of the lanes from l on: the even ones,
// then the odd ones.
template <class T, class Term>
static inline void sum_tile(std::int64_t columns, const Term& term, Lanes<T>& result) {
  each_vector<T>([&](int l) {
    Vector<T> even{}, odd{};
    std::int64_t e = 0;
    for (; e + 2 <= columns; e += 2) {
      even += term(e, l);
      odd += term(e + 1, l);
    }
    if (e < columns) even += term(e, l);
    store_vector(result + l, even + odd);
  });
}

// The columns before the result are transposed, four by four, as far as that goes.
static inline std::int64_t transpose_tile(const float* rows, std::int64_t columns,
                                          Lanes<float>* tile) {
  for (int l = 0; l < kLanes; l += 4)
    for (std::int64_t e = 0; e + 4 <= columns; e += 4)
      transpose_4x4(rows + l * columns + e, columns, &tile[e][l], kLanes);
  return columns / 4 * 4;
}
static inline std::int64_t transpose_tile(const Lanes<float>* tile, std::int64_t columns,
                                          float* rows) {
  for (int l = 0; l < kLanes; l += 4)
    for (std::int64_t e = 0; e + 4 <= columns; e += 4)
      transpose_4x4(&tile[e][l], kLanes, rows + l * columns + e, columns);
  return columns / 4 * 4;
}

// From rows to a tile; 0 in lanes that are not live, whose rows are not looked at.
template <class S, class W>
static inline void load_tile(const S* rows, std::int64_t columns, const bool* live,
                             Lanes<W>* tile) {
  bool all = true;
  for (int l = 0; l < kLanes; ++l) all &= live[l];
  std::int64_t done = 0;
  if constexpr (sizeof(S) == 4 && sizeof(W) == 4)
    if (all) done = transpose_tile(rows, columns, tile);
  for (std::int64_t l = 0; done < columns && l < kLanes; ++l)
    for (std::int64_t e = done; e < columns; ++e)
      tile[e][l] = live[l] ? static_cast<W>(load(rows[l * columns + e])) : W{0};
}

// The first `count` lanes of a tile to rows.
template <class W, class S>
static inline void store_tile(const Lanes<W>* tile, std::int64_t columns, std::int64_t count,
                              S* rows) {
  std::int64_t done = 0;
  if constexpr (sizeof(S) == 4 && sizeof(W) == 4)
    if (count == kLanes) done = transpose_tile(tile, columns, rows);
  for (std::int64_t l = 0; done < columns && l < count; ++l)
    for (std::int64_t e = done; e < columns; ++e)
      store(rows + l * columns + e, static_cast<Compute<S>>(tile[e][l]));
}

}  // namespace torch_routers
