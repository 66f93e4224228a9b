// A problem of entmax with the arrays of both directions, for tests of its kernels.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "entmax/entmax_kernel.h"
#include "host_array.h"

namespace torch_routers {

template <class S> struct EntmaxProblem {
  using C = Compute<S>;
  EntmaxShape shape;
  double alpha;
  bool is_learned = false;
  std::vector<S> logits{};
  std::vector<unsigned char> valid{};  // empty: all are
  std::vector<C> grad_weights{};

  static EntmaxProblem random(std::int64_t tokens, std::int64_t experts, double alpha,
                              double size = 1) {
    EntmaxProblem q{{tokens, experts}, alpha};
    std::mt19937 random(static_cast<unsigned>(tokens + 7 * experts));
    std::normal_distribution<double> normal;
    q.logits.resize(tokens * experts);
    for (S& x : q.logits) store(&x, static_cast<C>(size * normal(random)));
    for (std::size_t i = 0; i < q.logits.size(); ++i)
      q.grad_weights.push_back(static_cast<C>(normal(random)));
    return q;
  }
};

template <class C> struct EntmaxResults {
  std::vector<C> weights;
  std::vector<std::int64_t> counts;
  std::vector<C> grad_logits;
  std::vector<C> grad_alpha;  // [1] if it is learned

  bool operator==(const EntmaxResults&) const = default;
};

// `run(params, count)` runs one of the four.
template <template <class> class Array, class S, class Run>
EntmaxResults<Compute<S>> run_entmax(const EntmaxProblem<S>& q, const Run& run) {
  using C = Compute<S>;
  const auto [tokens, experts] = q.shape;
  const std::int64_t blocks = q.shape.blocks();
  const Array<S> logits(q.logits);
  const Array<unsigned char> valid(q.valid);
  const Array<C> learned(std::vector<C>{static_cast<C>(q.alpha)}), grad_weights(q.grad_weights);
  const Array<C> weights(tokens * experts), grad_logits(tokens * experts), grad_alpha(1);
  const Array<std::int64_t> partial(blocks * experts), counts(experts);
  const Array<double> partial_alpha(blocks);
  const EntmaxAlpha<C> alpha{q.is_learned ? learned.data() : nullptr, q.is_learned ? 0 : q.alpha};
  run(Entmax<S>{q.shape, logits.data(),
                q.valid.empty() ? nullptr : reinterpret_cast<const bool*>(valid.data()), alpha,
                weights.data(), partial.data()},
      blocks);
  run(EntmaxCounts{q.shape, partial.data(), counts.data()}, experts);
  run(EntmaxBackward<C>{q.shape, grad_weights.data(), weights.data(), alpha, grad_logits.data(),
                        q.is_learned ? partial_alpha.data() : nullptr},
      blocks);
  if (q.is_learned) run(EntmaxAlphaSum<C>{q.shape, partial_alpha.data(), grad_alpha.data()}, 1);
  return {weights.to_host(), counts.to_host(), grad_logits.to_host(),
          q.is_learned ? grad_alpha.to_host() : std::vector<C>{}};
}

}  // namespace torch_routers
