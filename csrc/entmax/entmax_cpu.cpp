// kLanes tokens at a time where experts are few, an expert's numbers of all of them side by side;
// else row by row. Which one it is depends on the number of experts alone, and the numbers of a token
// never on its neighbours: a lane that is done stands still.
#include "common/tile.h"
#include "entmax/entmax_kernel.h"
#include "entmax/entmax_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;
constexpr int64_t kTileExperts = 256;

template <class S> bool is_masked(const Entmax<S>& p, int64_t token) {
  return p.valid && !p.valid[token];
}

// body.operator()<kKind>() for an alpha that is one.
template <class Body> void with_kind(EntmaxKind kind, const Body& body) {
  switch (kind) {
    case EntmaxKind::Softmax: return body.template operator()<EntmaxKind::Softmax>();
    case EntmaxKind::Root: return body.template operator()<EntmaxKind::Root>();
    case EntmaxKind::Simplex: return body.template operator()<EntmaxKind::Simplex>();
    case EntmaxKind::General: return body.template operator()<EntmaxKind::General>();
    case EntmaxKind::Invalid: return;
  }
}

// What the weights of a row whose largest logit is `max` are multiplied by, their sum being `sum`.
template <class W> W scale_of(W sum, bool is_number) {
  return !is_number ? W(__builtin_nan("")) : sum == 0 ? W{0} : 1 / sum;
}

// ---- tiles -------------------------------------------------------------------------------------

// A lane without a token, or with a masked one, has logits 0.
template <class W> struct Tile {
  alignas(64) Lanes<W> u[kTileExperts];  // then weights
  alignas(64) Lanes<W> top, scale;
  alignas(64) Lanes<W> is_active, is_number;  // 0 or 1
  bool is_live[kLanes];
};

// From logits to u, for the first top.
template <EntmaxKind kKind, class C, class W>
void scale_tile(const EntmaxMethod<kKind, C>& method, int64_t experts, Tile<W>& tile) {
  alignas(64) Lanes<W> max;
  each_vector<W>([&](int l) {
    const Vector<W> lowest = Vector<W>{} + kLowestLogit<W>, zero{};
    Vector<W> largest = lowest, is_number = zero + 1;
    for (int64_t e = 0; e < experts; ++e) {
      const Vector<W> x = load_vector(tile.u[e] + l);
      largest = x > largest ? x : largest;
      is_number = x < -lowest ? is_number : zero;
    }
    store_vector(max + l, largest);
    store_vector(tile.is_number + l, is_number);
  });
  each_lane([&](int l) {
    const bool has_experts = max[l] != kLowestLogit<W>;
    tile.is_active[l] = tile.is_live[l] && has_experts ? tile.is_number[l] : W{0};
    tile.top[l] = method.kFirstTop;
    max[l] = has_experts ? max[l] : W{0};
  });
  for (int64_t e = 0; e < experts; ++e)
    each_lane([&](int l) { tile.u[e][l] = (tile.u[e][l] - max[l]) * method.factor; });
}

// The sums of all lanes, in two parts.
template <EntmaxKind kKind, class C, class W>
void entmax_sums(const EntmaxMethod<kKind, C>& method, int64_t experts, const Tile<W>& tile,
                 Lanes<W>& count, Lanes<W>& first, Lanes<W>& second) {
  if constexpr (kKind == EntmaxKind::General) {
    each_lane([&](int l) { count[l] = first[l] = second[l] = 0; });
    const auto power = method.power;
    alignas(64) Lanes<W> distance, raised, ratio;
    for (int64_t e = 0; e < experts; ++e) {  // as entmax_term
      // Loops of their own: in one, branches around the powers keep it from becoming vectors.
      each_lane([&](int l) { distance[l] = tile.top[l] + tile.u[e][l]; });
      each_lane([&](int l) { raised[l] = own_log(distance[l]) * power; });
      each_lane([&](int l) { raised[l] = own_exp(raised[l]); });
      each_lane([&](int l) { ratio[l] = raised[l] / distance[l]; });
      each_lane([&](int l) {
        first[l] += distance[l] > 0 ? raised[l] : W{0};
        second[l] += distance[l] > 0 ? ratio[l] : W{0};
      });
    }
  } else {
    for (int part = 0; part < kLanes; part += kWidth<W>) {
      const Vector<W> top = load_vector(tile.top + part), zero{}, one = zero + 1;
      Vector<W> counts[2] = {}, firsts[2] = {}, seconds[2] = {};
      const auto add = [&](int64_t e, int i) {  // as entmax_term
        const Vector<W> distance = top + load_vector(tile.u[e] + part);
        const auto is_inside = distance > zero;
        const Vector<W> inside = is_inside ? distance : zero;
        counts[i] += is_inside ? one : zero;
        firsts[i] += inside;
        if constexpr (kKind == EntmaxKind::Root) seconds[i] += inside * inside;
      };
      int64_t e = 0;
      for (; e + 2 <= experts; e += 2) add(e, 0), add(e + 1, 1);
      if (e < experts) add(e, 0);
      store_vector(count + part, counts[0] + counts[1]);
      store_vector(first + part, firsts[0] + firsts[1]);
      store_vector(second + part, seconds[0] + seconds[1]);
    }
  }
}

template <class W> bool any_active(const Tile<W>& tile) {
  W active = 0;
  for (int l = 0; l < kLanes; ++l) active += tile.is_active[l];
  return active != 0;
}

template <EntmaxKind kKind, class C, class W>
void solve_tile(const EntmaxMethod<kKind, C>& method, int64_t experts, Tile<W>& tile) {
  alignas(64) Lanes<W> count, first, second;
  if constexpr (kKind == EntmaxKind::General) {
    EntmaxSearch<C> search[kLanes];
    for (int l = 0; l < kLanes; ++l)
      search[l] = EntmaxSearch<C>::start(experts, tile.is_active[l] != 0);
    for (int turn = 0; any_active(tile); ++turn) {
      entmax_sums(method, experts, tile, count, first, second);
      for (int l = 0; l < kLanes; ++l) {
        if (!search[l].is_active) continue;
        search[l].advance(method, {count[l], first[l], second[l]}, turn);
        tile.top[l] = search[l].top;
        tile.is_active[l] = search[l].is_active;
      }
    }
  } else if constexpr (method.kIterates) {
    while (any_active(tile)) {
      entmax_sums(method, experts, tile, count, first, second);
      each_lane([&](int l) {
        const EntmaxSums<W> sums{count[l], first[l], second[l]};
        const auto step = entmax_step<kKind>(tile.top[l], sums);
        tile.top[l] -= tile.is_active[l] != 0 ? step.size : W{0};
        tile.is_active[l] = step.is_last != 0 ? W{0} : tile.is_active[l];
      });
    }
  }
}

template <EntmaxKind kKind, class C, class W>
void weigh_tile(const EntmaxMethod<kKind, C>& method, int64_t experts, Tile<W>& tile) {
  for (int64_t e = 0; e < experts; ++e)
    each_lane([&](int l) { tile.u[e][l] = method.weight(tile.top[l] + tile.u[e][l]); });
  alignas(64) Lanes<W> sum;
  sum_tile<W>(experts, [&](int64_t e, int l) { return load_vector(tile.u[e] + l); }, sum);
  each_lane([&](int l) {
    tile.scale[l] = tile.is_live[l] ? scale_of(sum[l], tile.is_number[l] != 0) : W{0};
  });
  for (int64_t e = 0; e < experts; ++e) each_lane([&](int l) { tile.u[e][l] *= tile.scale[l]; });
}

template <EntmaxKind kKind, class S>
void entmax_tile(const Entmax<S>& p, const EntmaxMethod<kKind, Compute<S>>& method, int64_t first,
                 int64_t count, int64_t* counts) {
  using C = Compute<S>;
  using W = EntmaxWork<kKind, C>;
  Tile<W> tile;
  for (int64_t l = 0; l < kLanes; ++l) tile.is_live[l] = l < count && !is_masked(p, first + l);
  load_tile(p.logits + first * p.experts, p.experts, tile.is_live, tile.u);
  scale_tile(method, p.experts, tile);
  solve_tile(method, p.experts, tile);
  weigh_tile(method, p.experts, tile);
  store_tile(tile.u, p.experts, count, p.weights + first * p.experts);
  for (int64_t e = 0; e < p.experts; ++e) {
    int active = 0;
    each_lane([&](int l) { active += static_cast<C>(tile.u[e][l]) != 0; });
    counts[e] += active;
  }
}

// ---- rows --------------------------------------------------------------------------------------

// The sums of one row of u, in the order of `sum_row`.
template <EntmaxKind kKind, class C, class W>
EntmaxSums<W> sums_of_row(const EntmaxMethod<kKind, C>& method, int64_t experts, W top, const C* x,
                          W max) {
  return reduce_row(
      experts, EntmaxSums<W>{},
      [](const EntmaxSums<W>& a, const EntmaxSums<W>& b) { return a + b; },
      [&](int64_t e) { return entmax_term(method, top + (x[e] - max) * method.factor); });
}

// Logits in x become weights; those of a row that is not masked.
template <EntmaxKind kKind, class C>
void entmax_row(const EntmaxMethod<kKind, C>& method, int64_t experts, C* x) {
  using W = EntmaxWork<kKind, C>;
  const C max = max_row(experts, kLowestLogit<C>, [&](int64_t e) { return x[e]; });
  const C strange =
      sum_row<C>(experts, [&](int64_t e) { return x[e] < -kLowestLogit<C> ? C{0} : C{1}; });
  const bool is_number = strange == 0;
  const bool has_experts = max != kLowestLogit<C>;
  const W origin = has_experts ? max : C{0};
  W top = method.kFirstTop;
  if constexpr (kKind == EntmaxKind::General) {
    auto search = EntmaxSearch<C>::start(experts, has_experts && is_number);
    for (int turn = 0; search.is_active; ++turn)
      search.advance(method, sums_of_row(method, experts, search.top, x, origin), turn);
    top = search.top;
  } else if constexpr (method.kIterates) {
    for (bool is_active = has_experts && is_number; is_active;) {
      const auto step = entmax_step<kKind>(top, sums_of_row(method, experts, top, x, origin));
      top -= step.size;
      is_active = step.is_last == 0;
    }
  }
  const auto weight = [&](int64_t e) {
    return method.weight(top + (x[e] - origin) * method.factor);
  };
  const W scale = scale_of(sum_row<W>(experts, weight), is_number);
  for (int64_t e = 0; e < experts; ++e) x[e] = static_cast<C>(weight(e) * scale);
}

// ---- blocks ------------------------------------------------------------------------------------

template <class Params> int64_t past_block(const Params& p, int64_t block) {
  const int64_t past = (block + 1) * p.kBlock;
  return past < p.tokens ? past : p.tokens;
}

template <EntmaxKind kKind, class S>
void entmax_block(const Entmax<S>& p, double alpha, int64_t block) {
  using C = Compute<S>;
  const auto method = EntmaxMethod<kKind, C>::of(alpha);
  const int64_t first = block * p.kBlock, past = past_block(p, block);
  int64_t* counts = p.partial_counts + block * p.experts;
  for (int64_t e = 0; e < p.experts; ++e) counts[e] = 0;
  if (p.experts <= kTileExperts) {
    for (int64_t t = first; t < past; t += kLanes)
      entmax_tile(p, method, t, past - t < kLanes ? past - t : kLanes, counts);
    return;
  }
  for (int64_t t = first; t < past; ++t) {
    C* weights = p.weights + t * p.experts;
    const bool masked = is_masked(p, t);
    for (int64_t e = 0; e < p.experts; ++e)
      weights[e] = masked ? C{0} : load(p.logits[t * p.experts + e]);
    if (masked) continue;
    entmax_row(method, p.experts, weights);
    for (int64_t e = 0; e < p.experts; ++e) counts[e] += weights[e] != 0;
  }
}

template <class S> void invalid_block(const Entmax<S>& p, int64_t block) {
  int64_t* counts = p.partial_counts + block * p.experts;
  for (int64_t e = 0; e < p.experts; ++e) counts[e] = 0;
  for (int64_t t = block * p.kBlock; t < past_block(p, block); ++t)
    for (int64_t e = 0; e < p.experts; ++e) {
      p.weights[t * p.experts + e] =
          is_masked(p, t) ? Compute<S>{0} : Compute<S>(__builtin_nan(""));
      counts[e] += !is_masked(p, t);
    }
}

template <EntmaxKind kKind, class C>
void gradient_block(const EntmaxBackward<C>& p, double alpha, int64_t block) {
  double of_alpha = 0;
  for (int64_t t = block * p.kBlock; t < past_block(p, block); ++t) {
    const C* w = p.weights + t * p.experts;
    const C* v = p.grad_weights + t * p.experts;
    C* dx = p.grad_logits + t * p.experts;
    for (int64_t e = 0; e < p.experts; ++e) dx[e] = entmax_slope<kKind>(alpha, w[e]);
    const C sum = sum_row<C>(p.experts, [&](int64_t e) { return dx[e]; });
    // Loaded whether it is used or not: GCC 12 loses elements in the masked load for AVX2.
    const C dot = sum_row<C>(p.experts, [&](int64_t e) {
      const C product = dx[e] * v[e];
      return dx[e] == 0 ? C{0} : product;
    });
    const C mean = sum == 0 ? C{0} : dot / sum;
    for (int64_t e = 0; e < p.experts; ++e) {
      const C gradient = dx[e] * (v[e] - mean);
      dx[e] = dx[e] == 0 ? C{0} : gradient;
    }
    if (p.partial_alpha)
      of_alpha -= sum_row<double>(p.experts, [&](int64_t e) {
        const double part = entmax_alpha_shift(alpha, w[e]) * dx[e];
        return w[e] == 0 ? 0 : part;
      });
  }
  if (p.partial_alpha) p.partial_alpha[block] = of_alpha;
}

}  // namespace

template <class S> void entmax(const Entmax<S>& p, int64_t begin, int64_t end) {
  const double alpha = p.alpha.value();
  const EntmaxKind kind = entmax_kind(alpha);
  for (int64_t block = begin; block < end; ++block) {
    if (kind == EntmaxKind::Invalid) invalid_block(p, block);
    with_kind(kind, [&]<EntmaxKind kKind>() { entmax_block<kKind>(p, alpha, block); });
  }
}

void entmax(const EntmaxCounts& p, int64_t begin, int64_t end) {
  for (int64_t e = begin; e < end; ++e) {
    p.counts[e] = 0;
    for (int64_t block = 0; block < p.blocks(); ++block)
      p.counts[e] += p.partial_counts[block * p.experts + e];
  }
}

template <class C> void entmax(const EntmaxBackward<C>& p, int64_t begin, int64_t end) {
  const double alpha = p.alpha.value();
  const EntmaxKind kind = entmax_kind(alpha);
  for (int64_t block = begin; block < end; ++block)
    with_kind(kind == EntmaxKind::Invalid ? EntmaxKind::General : kind,
              [&]<EntmaxKind kKind>() { gradient_block<kKind>(p, alpha, block); });
}

template <class C> void entmax(const EntmaxAlphaSum<C>& p, int64_t, int64_t) {
  *p.grad_alpha = static_cast<C>(
      sum_row<double>(p.blocks(), [&](int64_t block) { return p.partial_alpha[block]; }));
}

#define TORCH_ROUTERS_INSTANTIATE(S) template void entmax(const Entmax<S>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)
#define TORCH_ROUTERS_INSTANTIATE_COMPUTE(C)                        \
  template void entmax(const EntmaxBackward<C>&, int64_t, int64_t); \
  template void entmax(const EntmaxAlphaSum<C>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE_COMPUTE(float)
TORCH_ROUTERS_INSTANTIATE_COMPUTE(double)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
