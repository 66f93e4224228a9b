#include <torch/csrc/stable/library.h>

#include <tuple>

#include "entropy_gate/entropy_gate_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {
namespace {

using std::int64_t;

// What both operators get; contiguous after `prepare`.
struct Inputs {
  const char* op;
  Tensor logits;
  OptionalTensor valid_mask;
  EntropyRule rule;

  int64_t tokens() const { return logits.size(0); }
  int64_t experts() const { return logits.size(1); }

  void prepare() {
    check_shape(op, "logits", logits, logits.dim() == 2 && logits.size(1) >= 1,
                "[tokens, num_experts]");
    dispatch_float_double(op, "logits", logits, []<class T> {});
    if (valid_mask)
      check_tensor(op, "valid_mask", *valid_mask, logits, ScalarType::Bool,
                   has_shape(*valid_mask, {tokens()}), "[tokens=", tokens(), "]");
    const auto entropy = static_cast<int64_t>(rule.entropy);
    check(entropy == 0 || entropy == 1, op, ": expected entropy to be 0 or 1, got ", entropy);
    const auto crossing = static_cast<int64_t>(rule.crossing);
    check(0 <= crossing && crossing <= 2, op, ": expected crossing in [0, 2], got ", crossing);
    check(rule.q > 0 && rule.q <= 2, op, ": expected q above 0 and at most 2, got ", rule.q);
    // Below q = 1 the slope at a probability of 0 would be infinite.
    const bool positive = rule.q >= 1 ? rule.epsilon >= 0 : rule.epsilon > 0;
    check(positive && rule.epsilon < 1, op,
          ": expected epsilon from 0 to below 1, above 0 with q below 1, got ", rule.epsilon);
    check(rule.threshold == rule.threshold, op, ": expected threshold to be a number, got ",
          rule.threshold);
    check(rule.top_p >= 0, op, ": expected top_p >= 0, got ", rule.top_p);
    check(rule.keep_top_k >= 0, op, ": expected keep_top_k >= 0, got ", rule.keep_top_k);
    logits = as_contiguous(logits);
    valid_mask = contiguous(valid_mask);
  }

  template <class T> EntropyGateInputs<T> inputs() const {
    return {tokens(), experts(), data<T>(logits), data<bool>(valid_mask), rule};
  }

  template <class Params> void run(const Params& params) const {
    launch(
        logits, tokens(), 16 * experts(),
        [&](int64_t begin, int64_t end) { entropy_gate_cpu(params, begin, end); },
        [&](void* stream) { entropy_gate_cuda(params, stream); });
  }
};

EntropyRule rule_of(int64_t entropy, double q, double epsilon, double threshold, double top_p,
                    int64_t crossing, int64_t keep_top_k, bool renormalize) {
  return {static_cast<Entropy>(entropy),   q,          epsilon,    threshold < 1, threshold, top_p,
          static_cast<Crossing>(crossing), keep_top_k, renormalize};
}

std::tuple<Tensor, Tensor> entropy_gate(const Tensor& logits, const OptionalTensor& valid_mask,
                                        int64_t entropy, double q, double epsilon, double threshold,
                                        double top_p, int64_t crossing, int64_t keep_top_k,
                                        bool renormalize) {
  Inputs in{"entropy_gate", logits, valid_mask,
            rule_of(entropy, q, epsilon, threshold, top_p, crossing, keep_top_k, renormalize)};
  in.prepare();
  const Tensor weights = allocate(in.logits, {in.tokens(), in.experts()});
  const Tensor entropies = allocate(in.logits, {in.tokens()});
  dispatch_float_double(in.op, "logits", in.logits, [&]<class T>() {
    in.run(EntropyGate<T>{in.inputs<T>(), mutable_data<T>(weights), mutable_data<T>(entropies)});
  });
  return {weights, entropies};
}

Tensor entropy_gate_backward(const Tensor& grad_weights, const Tensor& grad_entropy,
                             const Tensor& logits, const Tensor& weights,
                             const OptionalTensor& valid_mask, int64_t entropy, double q,
                             double epsilon, double threshold, double top_p, int64_t crossing,
                             int64_t keep_top_k, bool renormalize) {
  constexpr auto op = "_entropy_gate_backward";
  Inputs in{op, logits, valid_mask,
            rule_of(entropy, q, epsilon, threshold, top_p, crossing, keep_top_k, renormalize)};
  in.prepare();
  const int64_t tokens = in.tokens(), experts = in.experts();
  const ScalarType type = in.logits.scalar_type();
  check_tensor(op, "grad_weights", grad_weights, in.logits, type,
               has_shape(grad_weights, {tokens, experts}), shape(in.logits));
  check_tensor(op, "weights", weights, in.logits, type, has_shape(weights, {tokens, experts}),
               shape(in.logits));
  check_tensor(op, "grad_entropy", grad_entropy, in.logits, type, has_shape(grad_entropy, {tokens}),
               "[tokens=", tokens, "]");
  const Tensor gw = as_contiguous(grad_weights), gh = as_contiguous(grad_entropy),
               w = as_contiguous(weights);
  const Tensor grad_logits = allocate(in.logits, {tokens, experts});
  dispatch_float_double(op, "logits", in.logits, [&]<class T>() {
    in.run(EntropyGateBackward<T>{in.inputs<T>(), data<T>(w), data<T>(gw), data<T>(gh),
                                  mutable_data<T>(grad_logits)});
  });
  return grad_logits;
}

}  // namespace

#define TORCH_ROUTERS_RULE                                                                 \
  "Tensor? valid_mask, int entropy, float q, float epsilon, float threshold, float top_p, " \
  "int crossing, int keep_top_k, bool renormalize"

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("entropy_gate(Tensor logits, " TORCH_ROUTERS_RULE ") -> (Tensor weights, Tensor entropy)");
  m.def("_entropy_gate_backward(Tensor grad_weights, Tensor grad_entropy, Tensor logits, "
        "Tensor weights, " TORCH_ROUTERS_RULE ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("entropy_gate", TORCH_BOX(&entropy_gate));
  m.impl("_entropy_gate_backward", TORCH_BOX(&entropy_gate_backward));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("entropy_gate", TORCH_BOX(&entropy_gate));
  m.impl("_entropy_gate_backward", TORCH_BOX(&entropy_gate_backward));
}
#endif

}  // namespace torch_routers
