// kLanes tokens at a time where experts are few, an expert's numbers of all of them side by side; else
// row by row. Which one it is depends on the number of experts alone.
#include "common/select.h"
#include "common/tile.h"
#include "entropy_gate/entropy_gate_kernel.h"
#include "entropy_gate/entropy_gate_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;
constexpr int64_t kTileExperts = 512;

struct OneLane {
  static constexpr int64_t first = 0, step = 1;
  template <class X> X sum(X x) const { return x; }
  template <class X> X max(X x) const { return x; }
  template <class T> Place<T> best(Place<T> place) const { return place; }
};

template <class T> struct Tile {
  alignas(64) Lanes<T> p[kTileExperts];  // logits, then their softmax
  bool live[kLanes];                     // lanes with an expert; results of the others are 0

  Tile(const EntropyGateInputs<T>& in, int64_t first, int64_t count) {
    for (int64_t l = 0; l < kLanes; ++l) live[l] = l < count && !(in.valid && !in.valid[first + l]);
    load_tile(in.logits + first * in.experts, in.experts, live, p);
  }

  void softmax(int64_t experts) {
    constexpr T kLowest = -static_cast<T>(__builtin_huge_val());
    alignas(64) Lanes<T> largest, sum, some;
    each_vector<T>([&](int l) {
      Vector<T> max = Vector<T>{} + kLowest, any{};
      const Vector<T> one = Vector<T>{} + 1;
      for (int64_t e = 0; e < experts; ++e) {
        const Vector<T> x = load_vector(p[e] + l);
        max = x > max ? x : max;
        any = x != kLowest ? one : any;
      }
      store_vector(largest + l, max);
      store_vector(some + l, any);
    });
    for (int l = 0; l < kLanes; ++l) live[l] &= some[l] != 0;
    for (int64_t e = 0; e < experts; ++e)
      each_lane([&](int l) { p[e][l] = own_exp(p[e][l] - largest[l]); });
    sum_tile<T>(experts, [&](int64_t e, int l) { return load_vector(p[e] + l); }, sum);
    for (int64_t e = 0; e < experts; ++e) each_lane([&](int l) { p[e][l] /= sum[l]; });
  }
};

// The sums over experts of (p + epsilon) u, and of p u; u itself where there is space for it.
template <bool kShannon, class T>
void entropy_sums(const EntropyFormula<T>& formula, int64_t experts, const Tile<T>& tile,
                  Lanes<T>& sum, Lanes<T>& mean, Lanes<T>* u) {
  each_lane([&](int l) { sum[l] = mean[l] = 0; });
  for (int64_t e = 0; e < experts; ++e)
    each_lane([&](int l) {
      const T p = tile.p[e][l], x = p + formula.epsilon;
      const T value = formula.template u_of<kShannon>(x);
      sum[l] += x * value;
      mean[l] += p * value;
      if (u) u[e][l] = value;
    });
}
template <class T>
void entropy_sums(const EntropyFormula<T>& formula, int64_t experts, const Tile<T>& tile,
                  Lanes<T>& sum, Lanes<T>& mean, Lanes<T>* u) {
  formula.shannon ? entropy_sums<true>(formula, experts, tile, sum, mean, u)
                  : entropy_sums<false>(formula, experts, tile, sum, mean, u);
}

// The keys of what is kept become kNoKey. Lanes that are not active stay as they are.
template <class T>
void select_tile(const EntropyRule& rule, int64_t experts, const Tile<T>& tile, bool* active,
                 Lanes<SignedBits<T>>* keys) {
  using Key = SignedBits<T>;
  alignas(64) Lanes<Key> expert;
  alignas(64) Lanes<T> before = {};
  for (int64_t j = 0; j < experts; ++j) {
    bool any = false;
    for (int l = 0; l < kLanes; ++l) any |= active[l];
    if (!any) return;
    each_vector<Key>([&](int l) {
      Vector<Key> best = Vector<Key>{} + kNoKey<T>, at{};
      for (int64_t e = 0; e < experts; ++e) {
        const Vector<Key> key = load_vector(keys[e] + l);
        const auto is_above = key > best;
        best = is_above ? key : best;
        at = is_above ? Vector<Key>{} + static_cast<Key>(e) : at;
      }
      store_vector(expert + l, at);
    });
    for (int l = 0; l < kLanes; ++l) {
      if (!active[l]) continue;
      const T with = before[l] + tile.p[expert[l]][l];
      active[l] = is_kept(rule, j, before[l], with);
      if (active[l]) keys[expert[l]][l] = kNoKey<T>;
      before[l] = with;
    }
  }
}

template <class T> void tokens(const EntropyGate<T>& p, int64_t first, int64_t count) {
  const int64_t experts = p.experts;
  Tile<T> tile(p, first, count);
  alignas(64) Lanes<SignedBits<T>> keys[kTileExperts];
  for (int64_t e = 0; e < experts; ++e)
    each_lane([&](int l) { keys[e][l] = signed_key(tile.p[e][l]); });
  tile.softmax(experts);
  const EntropyFormula<T> formula(p.rule, experts);
  alignas(64) Lanes<T> sum, mean, all, kept = {};
  bool active[kLanes];
  entropy_sums(formula, experts, tile, sum, mean, {});
  for (int64_t l = 0; l < kLanes; ++l) {
    const T entropy = experts == 1 ? T{0} : static_cast<T>(formula.value(sum[l]));
    if (l < count) p.entropy[first + l] = tile.live[l] ? entropy : T{0};
    active[l] = tile.live[l] && !keeps_all(p.rule, entropy);
    all[l] = tile.live[l] && !active[l];
  }
  select_tile(p.rule, experts, tile, active, keys);
  for (int64_t e = 0; e < experts; ++e)
    each_lane([&](int l) {
      const T w = all[l] != 0 || keys[e][l] == kNoKey<T> ? tile.p[e][l] : T{0};
      tile.p[e][l] = w;
      kept[l] += w;
    });
  for (int64_t e = 0; p.rule.renormalize && e < experts; ++e)
    each_lane([&](int l) {
      const T share = tile.p[e][l] / kept[l];
      tile.p[e][l] = kept[l] == 0 ? T{0} : share;
    });
  store_tile(tile.p, experts, count, p.weights + first * experts);
}

template <class T> void tokens(const EntropyGateBackward<T>& p, int64_t first, int64_t count) {
  const int64_t experts = p.experts;
  Tile<T> tile(p, first, count);
  tile.softmax(experts);
  alignas(64) Lanes<T> weights[kTileExperts], grads[kTileExperts];  // the latter then of logits
  load_tile(p.weights + first * experts, experts, tile.live, weights);
  load_tile(p.grad_weights + first * experts, experts, tile.live, grads);
  alignas(64) Lanes<T> dot, sum, mean, scale;
  sum_tile<T>(
      experts,
      [&](int64_t e, int l) {
        const Vector<T> w = load_vector(weights[e] + l), zero{};
        return w == zero ? zero : w * load_vector(grads[e] + l);
      },
      dot);
  bool of_entropy = false;
  for (int64_t l = 0; l < kLanes; ++l) {
    scale[l] = tile.live[l] && experts > 1 ? p.grad_entropy[first + l] : T{0};
    of_entropy |= scale[l] != 0;
  }
  const bool renormalize = p.rule.renormalize;
  for (int64_t e = 0; e < experts; ++e)
    each_lane([&](int l) {
      const T product = weights[e][l] * grads[e][l];
      const T result = weights[e][l] == 0 ? T{0} : product;
      grads[e][l] = result - (renormalize ? weights[e][l] : tile.p[e][l]) * dot[l];
    });
  if (of_entropy) {
    const EntropyFormula<T> formula(p.rule, experts);
    auto& u = weights;
    entropy_sums(formula, experts, tile, sum, mean, u);
    for (int l = 0; l < kLanes; ++l)
      scale[l] = scale[l] == 0 ? T{0} : scale[l] * formula.factor(sum[l]);
    for (int64_t e = 0; e < experts; ++e)
      each_lane([&](int l) {
        const T x = tile.p[e][l], added = scale[l] * x * (u[e][l] - mean[l]);
        grads[e][l] += scale[l] == 0 || x == 0 ? T{0} : added;
      });
  }
  for (int64_t l = 0; l < kLanes; ++l)
    for (int64_t e = 0; !tile.live[l] && e < experts; ++e) grads[e][l] = 0;
  store_tile(grads, experts, count, p.grad_logits + first * experts);
}

template <class Params> void run(const Params& p, int64_t begin, int64_t end) {
  if (p.experts > kTileExperts)
    for (int64_t token = begin; token < end; ++token) entropy_gate_row(p, token, OneLane{});
  else
    for (int64_t token = begin; token < end; token += kLanes)
      tokens(p, token, end - token < kLanes ? end - token : kLanes);
}

}  // namespace

template <class T> void entropy_gate(const EntropyGate<T>& p, int64_t begin, int64_t end) {
  run(p, begin, end);
}
template <class T> void entropy_gate(const EntropyGateBackward<T>& p, int64_t begin, int64_t end) {
  run(p, begin, end);
}

#define TORCH_ROUTERS_INSTANTIATE(T)                                 \
  template void entropy_gate(const EntropyGate<T>&, int64_t, int64_t); \
  template void entropy_gate(const EntropyGateBackward<T>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
