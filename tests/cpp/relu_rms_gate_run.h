// A call of the ReLU-RMSNorm gate, forward and backward, in arrays of the host or of a device.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "relu_rms_gate/relu_rms_gate_kernel.h"

namespace torch_routers {

template <class S> struct ReluProblem : ReluRmsGateShape {
  using C = Compute<S>;
  std::vector<S> logits;
  std::vector<C> gain, grad_weights;
  std::vector<char> valid;  // empty: all are
  ReluNorm norm;
  C eps = C(1e-5);

  ReluProblem(std::int64_t tokens, std::int64_t experts, ReluNorm norm, bool masked = false)
      : ReluRmsGateShape{tokens, experts}, logits(tokens * experts), norm(norm) {
    std::mt19937 random(static_cast<unsigned>(tokens * 131 + experts));
    std::normal_distribution<double> normal;
    for (S& z : logits) store(&z, static_cast<C>(normal(random)));
    for (std::int64_t e = 0; e < experts; ++e) gain.push_back(static_cast<C>(normal(random)));
    for (std::int64_t i = 0; i < tokens * experts; ++i)
      grad_weights.push_back(static_cast<C>(normal(random)));
    for (std::int64_t t = 0; masked && t < tokens; ++t) valid.push_back(random() % 3 != 0);
  }
};

template <class S> struct ReluResults {
  using C = Compute<S>;
  std::vector<C> weights, inverse_rms;
  std::vector<std::int64_t> counts;
  std::vector<S> grad_logits;
  std::vector<C> grad_gain;
};

template <class T> class HostArray {
 public:
  explicit HostArray(std::size_t size) : values_(size) {}
  explicit HostArray(const std::vector<T>& values) : values_(values) {}
  T* data() const { return const_cast<T*>(values_.data()); }
  std::vector<T> to_host() const { return values_; }

 private:
  std::vector<T> values_;
};

// `run(params, count)` runs one of the four.
template <template <class> class Array, class S, class Run>
ReluResults<S> run_relu(const ReluProblem<S>& q, const Run& run) {
  using C = Compute<S>;
  const std::int64_t size = q.tokens * q.experts, partial = q.blocks() * q.experts;
  const Array<S> logits(q.logits), grad_logits(size);
  const Array<C> gain(q.gain), grad_weights(q.grad_weights), weights(size), inverse(q.tokens),
      grad_gain(q.experts);
  const Array<char> valid(q.valid);
  const Array<std::int64_t> partial_counts(partial), counts(q.experts);
  const Array<double> partial_grads(partial);
  const auto* mask = q.valid.empty() ? nullptr : reinterpret_cast<const bool*>(valid.data());
  run(ReluRmsGate<S>{q, logits.data(), gain.data(), mask, weights.data(), inverse.data(),
                     partial_counts.data(), q.eps, q.norm},
      q.blocks());
  run(ReluRmsGateCombine<std::int64_t, std::int64_t>{q, partial_counts.data(), counts.data()},
      q.experts);
  run(ReluRmsGateBackward<S>{q, grad_weights.data(), logits.data(), gain.data(), mask,
                             grad_logits.data(), partial_grads.data(), q.eps, q.norm},
      q.blocks());
  run(ReluRmsGateCombine<double, C>{q, partial_grads.data(), grad_gain.data()}, q.experts);
  return {weights.to_host(), inverse.to_host(), counts.to_host(), grad_logits.to_host(),
          grad_gain.to_host()};
}

}  // namespace torch_routers
