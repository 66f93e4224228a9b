#include <cmath>

#include "bytes.h"
#include "entropy_gate/entropy_gate_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class T> struct Inputs {
  int64_t tokens, experts;
  EntropyRule rule;
  Array<T> logits, grad_weights, grad_entropy;
  std::optional<Array<bool>> valid;

  explicit Inputs(Bytes& bytes)
      : tokens(bytes.size(0, 30)),
        experts(bytes.size(1, 70)),
        rule{static_cast<Entropy>(bytes.integer(0, 1)),
             static_cast<double>(bytes.integer(1, 40)) / 20,
             bytes.flag() ? 1e-5 : 0.5,
             bytes.flag(),
             bytes.share(),
             1.2 * bytes.share(),
             static_cast<Crossing>(bytes.integer(0, 2)),
             bytes.integer(0, 80),
             bytes.flag()},
        logits(bytes.numbers<T>(tokens * experts, bytes.kind())),
        grad_weights(bytes.numbers<T>(tokens * experts, bytes.kind())),
        grad_entropy(bytes.numbers<T>(tokens, bytes.kind())) {
    if (bytes.flag()) valid.emplace(bytes.flags(tokens));
  }
};

template <class T> struct Results {
  Array<T> weights, entropy, grad_logits;

  Results(const Inputs<T>& in, Isa isa, double cut, unsigned char fill)
      : weights(in.tokens * in.experts, fill),
        entropy(in.tokens, fill),
        grad_logits(in.tokens * in.experts, fill) {
    const auto run = [&](const auto& params) {
      in_parts(cut, in.tokens, [&](int64_t begin, int64_t end) {
        TORCH_ROUTERS_PICK_ISA(isa, entropy_gate(params, begin, end));
      });
    };
    const EntropyGateInputs<T> inputs{in.tokens, in.experts, in.logits.data(), data(in.valid),
                                      in.rule};
    run(EntropyGate<T>{inputs, weights.data(), entropy.data()});
    run(EntropyGateBackward<T>{inputs, weights.data(), in.grad_weights.data(),
                               in.grad_entropy.data(), grad_logits.data()});
  }

  bool operator==(const Results&) const = default;
};

// The kept experts are a prefix of the order of the logits, of keep_top_k at least.
template <class T> void check_results(const Inputs<T>& in, const Results<T>& out) {
  for (int64_t t = 0; t < in.tokens; ++t) {
    const T* logits = in.logits.data() + t * in.experts;
    const T* weights = out.weights.data() + t * in.experts;
    const bool masked = in.valid && !(*in.valid)[t];
    bool finite = true;
    double sum = 0;
    for (int64_t e = 0; e < in.experts; ++e) {
      expect(!masked || weights[e] == 0, "no expert of a masked token");
      expect(!masked || out.grad_logits[t * in.experts + e] == 0, "no gradient of a masked token");
      finite = finite && std::isfinite(logits[e]);
      sum += weights[e];
    }
    if (masked || !finite) continue;
    expect(sum < 1.001, "a sum of probabilities");
    int64_t kept = 0, above = 0;  // above: of those kept, whose logit is below one that is not
    for (int64_t e = 0; e < in.experts; ++e) {
      kept += weights[e] != 0;
      for (int64_t other = 0; other < in.experts; ++other)
        above += weights[e] != 0 && weights[other] == 0 && logits[other] > logits[e];
    }
    expect(above == 0, "the largest logits to be kept");
    if (in.rule.epsilon < 0.1 && in.rule.q >= 1)
      expect(out.entropy[t] > -0.01 && out.entropy[t] < 1.01, "an entropy in its bounds");
  }
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_routers::fuzz;
  Bytes bytes(data, size);
  bytes.pick_compute_type([&]<class T>() {
    run_twice<Inputs<T>, Results<T>>(
        bytes, [](const auto& in, const auto& out) { check_results(in, out); });
  });
  return 0;
}
