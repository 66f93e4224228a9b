#include <cmath>

#include "bytes.h"
#include "relu_rms_gate/relu_rms_gate_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class S> struct Inputs {
  using C = Compute<S>;
  ReluRmsGateShape shape;
  ReluNorm norm;
  C eps;
  Array<S> logits;
  Array<C> gain, grad_weights;
  std::optional<Array<bool>> valid;

  explicit Inputs(Bytes& bytes)
      : shape{bytes.size(0, 150), bytes.size(1, 90)},
        norm(static_cast<ReluNorm>(bytes.integer(0, 2))),
        eps(bytes.flag() ? C(1e-5) : C(1e-30)),
        logits(bytes.numbers<S>(shape.tokens * shape.experts, bytes.kind())),
        gain(bytes.numbers<C>(shape.experts, bytes.kind())),
        grad_weights(bytes.numbers<C>(shape.tokens * shape.experts, bytes.kind())) {
    if (bytes.flag()) valid = bytes.flags(shape.tokens);
  }
  bool is_valid(int64_t token) const { return !valid || (*valid)[token]; }
};

template <class S> struct Results {
  using C = Compute<S>;
  Array<C> weights, inverse_rms;
  Array<int64_t> counts;
  Array<S> grad_logits;
  Array<C> grad_gain;

  Results(const Inputs<S>& in, Isa isa, double cut, unsigned char fill)
      : weights(in.logits.size(), fill),
        inverse_rms(in.shape.tokens, fill),
        counts(in.shape.experts, fill),
        grad_logits(in.logits.size(), fill),
        grad_gain(in.shape.experts, fill) {
    const auto run = [&](const auto& params, int64_t count) {
      in_parts(cut, count, [&](int64_t begin, int64_t end) {
        TORCH_ROUTERS_PICK_ISA(isa, relu_rms_gate(params, begin, end));
      });
    };
    const ReluRmsGateShape& shape = in.shape;
    const int64_t partial = shape.blocks() * shape.experts;
    const Array<int64_t> partial_counts(partial, fill);
    const Array<double> partial_grads(partial, fill);
    run(ReluRmsGate<S>{shape, in.logits.data(), in.gain.data(), data(in.valid), weights.data(),
                       inverse_rms.data(), partial_counts.data(), in.eps, in.norm},
        shape.blocks());
    run(ReluRmsGateCombine<int64_t, int64_t>{shape, partial_counts.data(), counts.data()},
        shape.experts);
    run(ReluRmsGateBackward<S>{shape, in.grad_weights.data(), in.logits.data(), in.gain.data(),
                               data(in.valid), grad_logits.data(), partial_grads.data(), in.eps,
                               in.norm},
        shape.blocks());
    run(ReluRmsGateCombine<double, C>{shape, partial_grads.data(), grad_gain.data()},
        shape.experts);
  }
  bool operator==(const Results&) const = default;
};

template <class S> void check_results(const Inputs<S>& in, const Results<S>& out) {
  const auto [tokens, experts] = in.shape;
  for (int64_t e = 0; e < experts; ++e) {
    int64_t active = 0;
    for (int64_t t = 0; t < tokens; ++t)
      active += in.is_valid(t) && load(in.logits[t * experts + e]) > 0;
    expect(out.counts[e] == active, "the number of tokens with a positive logit");
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = t * experts; i < (t + 1) * experts; ++i) {
      const bool dead = load(in.logits[i]) <= 0;
      if (!in.is_valid(t)) expect(out.weights[i] == 0, "no weight of a masked token");
      if (!in.is_valid(t) || dead)
        expect(load(out.grad_logits[i]) == 0, "no gradient of what is not active");
      const auto y = out.weights[i];
      if (in.is_valid(t) && dead) expect(y == 0 || y != y, "no weight of what is not active");
    }
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_routers::fuzz;
  Bytes bytes(data, size);
  bytes.pick_type([&]<class S>() {
    run_twice<Inputs<S>, Results<S>>(
        bytes, [](const auto& in, const auto& out) { check_results(in, out); });
  });
  return 0;
}
