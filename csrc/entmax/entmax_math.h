// Formulas of entmax_kernel.h shared by CPU and CUDA. With u_i = a (x_i - max x) <= 0 the threshold is
// found as top = max - tau, in (0, 1]: p_i = (top + u_i)_+^(1 / a). It is approached from above, 1:
//
//   alpha 1.5  Newton on the sum of squares, which is convex; last, the root of the quadratic function
//              that the sum is while no expert leaves or enters
//   alpha 2    the exact root for the experts that are left, until none leaves
//   else       Newton on q = top^(1 / a), the largest p: the sum of p is linear in q where a is next
//              to 0 and where all logits are equal, convex for a < 1; bisection guards the rest
#pragma once

#include "common/score.h"
#include "entmax/entmax_kernel.h"

namespace torch_routers {

enum class EntmaxKind { Softmax, Root, Simplex, General, Invalid };

TORCH_ROUTERS_HOST_DEVICE static inline EntmaxKind entmax_kind(double alpha) {
  return !(alpha >= 1 && alpha - alpha == 0) ? EntmaxKind::Invalid
         : alpha < 1 + 1e-4                  ? EntmaxKind::Softmax
         : alpha == 1.5                      ? EntmaxKind::Root
         : alpha == 2                        ? EntmaxKind::Simplex
                                             : EntmaxKind::General;
}

// What a row is computed in: powers need the precision of double, also for float.
template <EntmaxKind kKind, class C> struct EntmaxWorkOf {
  using type = C;
};
template <class C> struct EntmaxWorkOf<EntmaxKind::General, C> {
  using type = double;
};
template <EntmaxKind kKind, class C> using EntmaxWork = typename EntmaxWorkOf<kKind, C>::type;

template <class W> static constexpr W kLowestLogit = -__builtin_huge_val();

// Unnamed, for the reason why functions are `static` here: see common/scalar.h.
namespace {

template <EntmaxKind kKind, class C> struct EntmaxMethod {
  using W = EntmaxWork<kKind, C>;
  static constexpr bool kIterates = kKind != EntmaxKind::Softmax;
  static constexpr W kFirstTop = kIterates ? 1 : 0;
  W factor, power;  // a, 1 / a

  // General stops there, relatively.
  TORCH_ROUTERS_HOST_DEVICE W close() const {
    return sizeof(C) == 4 && factor < 1 ? W(1e-10) : W(1e-15);
  }

  static TORCH_ROUTERS_HOST_DEVICE EntmaxMethod of(double alpha) {
    const double a = kIterates ? alpha - 1 : 1;
    return {static_cast<W>(a), static_cast<W>(1 / a)};
  }

  // Proportional to p; distance = top + u.
  TORCH_ROUTERS_HOST_DEVICE W weight(W distance) const {
    if constexpr (kKind == EntmaxKind::Softmax) return own_exp(distance);
    const W inside = distance > 0 ? distance : W{0};
    if constexpr (kKind == EntmaxKind::Root) return inside * inside;
    if constexpr (kKind == EntmaxKind::Simplex) return inside;
    const W raised = own_exp(static_cast<W>(own_log(distance)) * power);
    return distance > 0 ? raised : W{0};
  }
};

// Sums over a row. Root, Simplex: experts inside, distances, their squares. General: nothing, p,
// p / distance.
template <class W> struct EntmaxSums {
  W count, first, second;

  TORCH_ROUTERS_HOST_DEVICE EntmaxSums operator+(const EntmaxSums& other) const {
    return {count + other.count, first + other.first, second + other.second};
  }
};

template <EntmaxKind kKind, class C, class W>
TORCH_ROUTERS_HOST_DEVICE inline EntmaxSums<W> entmax_term(const EntmaxMethod<kKind, C>& method,
                                                           W distance) {
  const bool is_inside = distance > 0;
  const W p = method.weight(distance);
  if constexpr (kKind == EntmaxKind::General) return {W{0}, p, is_inside ? p / distance : W{0}};
  const W inside = is_inside ? distance : W{0};
  return {is_inside ? W{1} : W{0}, inside, kKind == EntmaxKind::Root ? p : W{0}};
}

// How far top goes down, and whether that was the last time, 0 or 1: loops over them become vectors.
template <class W> struct EntmaxStep {
  W size, is_last;
};

template <EntmaxKind kKind, class W>
TORCH_ROUTERS_HOST_DEVICE inline EntmaxStep<W> entmax_step(W top, const EntmaxSums<W>& sums) {
  constexpr bool kFloat = sizeof(W) == 4;
  if constexpr (kKind == EntmaxKind::Simplex) {
    const W size = (sums.first - 1) / sums.count;
    return {size, size > W(kFloat ? 0x1p-22 : 0x1p-51) ? W{0} : W{1}};
  }
  const W excess = sums.second - 1, newton = excess / (2 * sums.first);
  // The next step would be as the square of this one: those who are inside stay.
  const W is_last = newton > W(kFloat ? 1e-4 : 1e-8) * top ? W{0} : W{1};
  const W rest = sums.first * sums.first - sums.count * excess;
  const W exact = excess / (sums.first + own_sqrt(rest > 0 ? rest : W{0}));
  return {is_last != 0 ? exact : newton, is_last};
}

// General: the largest p of a row, and where it is known to be.
template <class C> struct EntmaxSearch {
  double largest, low, high, top;
  bool is_active;

  static TORCH_ROUTERS_HOST_DEVICE EntmaxSearch start(std::int64_t experts, bool is_active) {
    return {1, 0.5 / static_cast<double>(experts), 1, 1, is_active};
  }

  TORCH_ROUTERS_HOST_DEVICE void advance(const EntmaxMethod<EntmaxKind::General, C>& method,
                                         const EntmaxSums<double>& sums, int turn) {
    constexpr int kTurns = 250;
    const double excess = sums.first - 1;
    (excess >= 0 ? high : low) = largest;
    const double newton = largest - excess * largest / (sums.second * top);
    const double size = newton > largest ? newton - largest : largest - newton;
    // Without convexity a short step does not mean that the root is near: slopes may be endless.
    const bool is_convex = method.factor < 1;
    const bool is_there = is_convex ? size <= method.close() * largest
                                    : (excess < 0 ? -excess : excess) <= 4 * method.close();
    const bool is_between = low < newton && newton < high;
    // ... and a third of the steps halve what is left.
    const bool halves = !is_there && (!is_between || (!is_convex && turn % 3 == 2));
    largest = halves ? (low + high) / 2 : newton;
    is_active = !is_there && high - low > method.close() * high && turn < kTurns;
    const double raised = own_exp(method.factor * own_log(largest));
    top = raised > 0x1p-1000 ? raised : 0x1p-1000;  // the largest logit is always inside
  }
};

}  // namespace

// ---- backward ------------------------------------------------------------------------------------

// s of a weight p.
template <EntmaxKind kKind, class C>
TORCH_ROUTERS_HOST_DEVICE static inline C entmax_slope(double alpha, C p) {
  if constexpr (kKind == EntmaxKind::Softmax) return p;
  if constexpr (kKind == EntmaxKind::Root) return p == 0 ? C{0} : own_sqrt(p);
  if constexpr (kKind == EntmaxKind::Simplex) return p == 0 ? C{0} : p == p ? C{1} : p;
  return p == 0 ? C{0} : static_cast<C>(own_exp((2 - alpha) * own_log(static_cast<double>(p))));
}

// r of a weight p > 0; see entmax_kernel.h. A series where the difference would lose digits.
template <class C>
TORCH_ROUTERS_HOST_DEVICE static inline double entmax_alpha_shift(double alpha, C weight) {
  const auto p = static_cast<double>(weight);
  const double a = entmax_kind(alpha) == EntmaxKind::Softmax ? 0 : alpha - 1;
  const double log = own_log(p), y = a * log;
  // sum over k of (k + 1) / (k + 2)! y^k: of term k + 1 to term k
  double sum = 1;
  for (int k = 15; k >= 1; --k) sum = 1 + sum * y * ((k + 1) / (k * (k + 2.0)));
  return y < -0.5 ? (1 - own_exp(y) * (1 - y)) / (a * a) : 0.5 * log * log * sum;
}

}  // namespace torch_routers
