// Inputs and results of the entropy gate, in the memory of the CPU or of a device.
#pragma once

#include <random>
#include <vector>

#include "entropy_gate/entropy_gate_kernel.h"
#include "host_array.h"

namespace torch_routers {

// What DynMoLE has.
inline EntropyRule entropy_rule() {
  return {Entropy::Tsallis, 1.1, 1e-5, true, 0.9, 0.75, Crossing::Below, 2, false};
}

template <class T> struct EntropyResults {
  std::vector<T> weights, entropy, grad_logits;
  bool operator==(const EntropyResults&) const = default;
};

template <class T> struct EntropyProblem {
  std::int64_t tokens, experts;
  EntropyRule rule = entropy_rule();
  std::vector<T> logits, grad_weights, grad_entropy;
  std::vector<unsigned char> valid;  // every third token from the second on is masked

  EntropyProblem(std::int64_t tokens, std::int64_t experts) : tokens(tokens), experts(experts) {
    std::mt19937 random(static_cast<unsigned>(tokens * 1000 + experts));
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<T>& values, std::int64_t size, double spread) {
      for (std::int64_t i = 0; i < size; ++i)
        values.push_back(static_cast<T>(spread * normal(random)));
    };
    fill(logits, tokens * experts, 2);
    fill(grad_weights, tokens * experts, 1);
    fill(grad_entropy, tokens, 1);
    for (std::int64_t t = 0; t < tokens; ++t) valid.push_back(t % 3 != 1);
    // Ties, as of logits that were rounded.
    for (std::int64_t i = 0; i < tokens * experts; i += 2)
      logits[i] = static_cast<T>(static_cast<int>(logits[i]));
  }

  // `run(params, tokens)` runs one of the two kernels.
  template <template <class> class Array, class Run> EntropyResults<T> run(const Run& run) const {
    const Array<T> z(logits), grad(grad_weights), grad_h(grad_entropy);
    const Array<unsigned char> mask(valid);
    const Array<T> weights(logits.size()), entropy(tokens), grad_z(logits.size());
    const EntropyGateInputs<T> in{tokens, experts, z.data(),
                                  reinterpret_cast<const bool*>(mask.data()), rule};
    run(EntropyGate<T>{in, weights.data(), entropy.data()}, tokens);
    run(EntropyGateBackward<T>{in, weights.data(), grad.data(), grad_h.data(), grad_z.data()},
        tokens);
    return {weights.to_host(), entropy.to_host(), grad_z.to_host()};
  }
};

}  // namespace torch_routers
