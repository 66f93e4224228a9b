// kLanes tokens at a time where experts are few, an expert's numbers of all of them side by side; else
// row by row. Which one it is depends on the number of experts alone.
#include "common/tile.h"
#include "relu_rms_gate/relu_rms_gate_kernel.h"
#include "relu_rms_gate/relu_rms_gate_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;
constexpr int64_t kTileExperts = 512;

// ---- tiles ---------------------------------------------------------------------------------------

template <class C> struct Tile {
  alignas(64) Lanes<C> a[kTileExperts];  // 0 in lanes that are not live
  alignas(64) Lanes<C> mean, inverse;    // of their norms
  bool live[kLanes];

  template <class Params> Tile(const Params& p, int64_t first, int64_t count) {
    const int64_t experts = p.experts;
    for (int64_t l = 0; l < kLanes; ++l) live[l] = l < count && !(p.valid && !p.valid[first + l]);
    load_tile(p.logits + first * experts, experts, live, a);
    for (int64_t e = 0; e < experts; ++e) each_lane([&](int l) { a[e][l] = relu(a[e][l]); });
    each_lane([&](int l) { mean[l] = 0, inverse[l] = 1; });
    if (p.norm == ReluNorm::Simple) return;
    const C size = static_cast<C>(experts), eps = p.eps;
    if (p.norm == ReluNorm::Centered) {
      sum_tile<C>(experts, [&](int64_t e, int l) { return load_vector(a[e] + l); }, mean);
      each_lane([&](int l) { mean[l] /= size; });
    }
    sum_tile<C>(
        experts,
        [&](int64_t e, int l) {
          const Vector<C> distance = load_vector(a[e] + l) - load_vector(mean + l);
          return distance * distance;
        },
        inverse);
    each_lane([&](int l) { inverse[l] = 1 / own_sqrt(inverse[l] / size + eps); });
  }

  RowNorm<C> norm(int l) const { return {mean[l], inverse[l]}; }
};

template <class S>
void tokens(const ReluRmsGate<S>& p, int64_t first, int64_t count, int64_t* counts) {
  const int64_t experts = p.experts;
  Tile<Compute<S>> tile(p, first, count);
  for (int64_t e = 0; e < experts; ++e) {
    const Compute<S> gain = p.gain[e];
    int active = 0;
    each_lane([&](int l) {
      const Compute<S> a = tile.a[e][l];
      active += a > 0;
      tile.a[e][l] = tile.norm(l).normalized(a) * gain;
    });
    counts[e] += active;
  }
  for (int64_t l = 0; l < count; ++l) {
    p.inverse_rms[first + l] = tile.live[l] ? tile.inverse[l] : 0;
    for (int64_t e = 0; !tile.live[l] && e < experts; ++e) tile.a[e][l] = 0;  // without a sign
  }
  store_tile(tile.a, experts, count, p.weights + first * experts);
}

template <class S>
void tokens(const ReluRmsGateBackward<S>& p, int64_t first, int64_t count, double* grads) {
  using C = Compute<S>;
  const int64_t experts = p.experts;
  const C size = static_cast<C>(experts);
  const C* gain = p.gain;
  Tile<C> tile(p, first, count);
  alignas(64) Lanes<C> v[kTileExperts], mean_u = {}, mean_uh = {};  // v: then of the logits
  load_tile(p.grad_weights + first * experts, experts, tile.live, v);
  if (p.norm == ReluNorm::Centered)
    sum_tile<C>(
        experts,
        [&](int64_t e, int l) {
          const Vector<C> u = load_vector(v[e] + l) * gain[e], zero{};
          return load_vector(tile.a[e] + l) == zero ? zero : u;
        },
        mean_u);
  if (p.norm != ReluNorm::Simple)
    sum_tile<C>(
        experts,
        [&](int64_t e, int l) {
          const Vector<C> a = load_vector(tile.a[e] + l), zero{};
          const Vector<C> mean = a > zero ? load_vector(tile.mean + l) : zero;
          return load_vector(v[e] + l) * gain[e] * ((a - mean) * load_vector(tile.inverse + l));
        },
        mean_uh);
  each_lane([&](int l) { mean_u[l] /= size, mean_uh[l] /= size; });
  for (int64_t e = 0; e < experts; ++e) {
    alignas(64) Lanes<double> products;
    each_lane([&](int l) {
      const C a = tile.a[e][l], h = tile.norm(l).normalized(a);
      products[l] = static_cast<double>(v[e][l]) * static_cast<double>(h);
      v[e][l] = tile.norm(l).gradient(a, v[e][l] * gain[e], h, mean_u[l], mean_uh[l]);
    });
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) products[l] += products[l + half];
    grads[e] += products[0];
  }
  store_tile(v, experts, count, p.grad_logits + first * experts);
}

// ---- rows ----------------------------------------------------------------------------------------

template <class Params>
RowNorm<typename Params::C> row_norm(const Params& p, int64_t token) {
  using C = typename Params::C;
  const auto* z = p.logits + token * p.experts;
  return {p.norm, p.eps, p.experts, [&](const auto& term) {
            return sum_row<C>(p.experts, [&](int64_t e) { return term(relu<C>(load(z[e]))); });
          }};
}

template <class S> void token(const ReluRmsGate<S>& p, int64_t t, int64_t* counts) {
  using C = Compute<S>;
  const S* z = p.logits + t * p.experts;
  C* y = p.weights + t * p.experts;
  if (p.valid && !p.valid[t]) {
    for (int64_t e = 0; e < p.experts; ++e) y[e] = 0;
    p.inverse_rms[t] = 0;
    return;
  }
  const RowNorm<C> norm = row_norm(p, t);
  p.inverse_rms[t] = norm.inverse;
  for (int64_t e = 0; e < p.experts; ++e) {
    const C a = relu<C>(load(z[e]));
    y[e] = norm.normalized(a) * p.gain[e];
  }
  for (int64_t e = 0; e < p.experts; ++e) counts[e] += C{load(z[e])} > 0;
}

template <class S> void token(const ReluRmsGateBackward<S>& p, int64_t t, double* grads) {
  using C = Compute<S>;
  const int64_t row = t * p.experts;
  const S* z = p.logits + row;
  const C* v = p.grad_weights + row;
  S* grad = p.grad_logits + row;
  if (p.valid && !p.valid[t]) {
    for (int64_t e = 0; e < p.experts; ++e) store(grad + e, C{0});
    return;
  }
  const RowNorm<C> norm = row_norm(p, t);
  const C size = static_cast<C>(p.experts);
  C mean_u = 0, mean_uh = 0;
  // Loaded whether it is used or not: GCC 12 loses elements in the masked load for AVX2.
  if (p.norm == ReluNorm::Centered)
    mean_u = sum_row<C>(p.experts,
                        [&](int64_t e) {
                          const C u = v[e] * p.gain[e];
                          return C{load(z[e])} <= 0 ? C{0} : u;
                        }) /
             size;
  if (p.norm != ReluNorm::Simple)
    mean_uh = sum_row<C>(p.experts,
                         [&](int64_t e) {
                           return v[e] * p.gain[e] * norm.normalized(relu<C>(load(z[e])));
                         }) /
              size;
  for (int64_t e = 0; e < p.experts; ++e) {
    const C a = relu<C>(load(z[e])), h = norm.normalized(a);
    store(grad + e, norm.gradient(a, v[e] * p.gain[e], h, mean_u, mean_uh));
    grads[e] += static_cast<double>(v[e]) * static_cast<double>(h);
  }
}

template <class Params, class Element>
void block_of_tokens(const Params& p, int64_t block, Element* partial) {
  const int64_t first = block * p.kBlock;
  const int64_t past = first + p.kBlock < p.tokens ? first + p.kBlock : p.tokens;
  partial += block * p.experts;
  for (int64_t e = 0; e < p.experts; ++e) partial[e] = 0;
  if (p.experts > kTileExperts)
    for (int64_t t = first; t < past; ++t) token(p, t, partial);
  else
    for (int64_t t = first; t < past; t += kLanes)
      tokens(p, t, past - t < kLanes ? past - t : kLanes, partial);
}

}  // namespace

template <class S> void relu_rms_gate(const ReluRmsGate<S>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) block_of_tokens(p, block, p.partial_counts);
}

template <class S>
void relu_rms_gate(const ReluRmsGateBackward<S>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) block_of_tokens(p, block, p.partial_grads);
}

template <class From, class To>
void relu_rms_gate(const ReluRmsGateCombine<From, To>& p, int64_t begin, int64_t end) {
  for (int64_t e = begin; e < end; ++e) {
    From sum = 0;
    for (int64_t block = 0; block < p.blocks(); ++block) sum += p.from[block * p.experts + e];
    p.to[e] = static_cast<To>(sum);
  }
}

#define TORCH_ROUTERS_INSTANTIATE(S)                                    \
  template void relu_rms_gate(const ReluRmsGate<S>&, int64_t, int64_t); \
  template void relu_rms_gate(const ReluRmsGateBackward<S>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)
template void relu_rms_gate(const ReluRmsGateCombine<int64_t, int64_t>&, int64_t, int64_t);
template void relu_rms_gate(const ReluRmsGateCombine<double, float>&, int64_t, int64_t);
template void relu_rms_gate(const ReluRmsGateCombine<double, double>&, int64_t, int64_t);

}  // namespace torch_routers::TORCH_ROUTERS_ISA
