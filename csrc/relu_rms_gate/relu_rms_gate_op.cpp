#include <torch/csrc/stable/library.h>

#include <tuple>

#include "op/check.h"
#include "op/dispatch.h"
#include "relu_rms_gate/relu_rms_gate_kernel.h"

namespace torch_routers {
namespace {

using std::int64_t;

template <class Params>
void run(const Tensor& on, int64_t count, int64_t cost, const Params& params) {
  launch(
      on, count, cost, [&](int64_t begin, int64_t end) { relu_rms_gate_cpu(params, begin, end); },
      [&](void* stream) { relu_rms_gate_cuda(params, stream); });
}

ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What both operators ask of their arguments.
ReluRmsGateShape check_arguments(const char* op, const Tensor& logits, const Tensor& gain,
                                 double eps, int64_t norm, const OptionalTensor& valid_mask) {
  check_floating(op, "logits", logits);
  check_shape(op, "logits", logits, logits.dim() == 2 && logits.size(1) >= 1,
              "[..., num_experts] with num_experts >= 1");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_tensor(op, "gain", gain, logits, compute_type(logits), has_shape(gain, {experts}), "[",
               experts, "], one value per expert");
  if (valid_mask)
    check_tensor(op, "valid_mask", *valid_mask, logits, ScalarType::Bool,
                 has_shape(*valid_mask, {tokens}), "[", tokens, "], one value per token");
  // Below the normal numbers of float32 a row of zeros would be 0 / 0.
  check(1e-30 <= eps && eps <= 1e30, op, ": expected eps in [1e-30, 1e30], got ", eps);
  constexpr auto last = static_cast<int64_t>(ReluNorm::Simple);
  check(0 <= norm && norm <= last, op, ": expected norm in [0, ", last, "], got ", norm);
  return {tokens, experts};
}

std::tuple<Tensor, Tensor, Tensor> relu_rms_gate(const Tensor& logits, const Tensor& gain,
                                                 double eps, int64_t norm,
                                                 const OptionalTensor& valid_mask) {
  constexpr auto op = "relu_rms_gate";
  const ReluRmsGateShape shape = check_arguments(op, logits, gain, eps, norm, valid_mask);
  const Tensor z = as_contiguous(logits), g = as_contiguous(gain);
  const OptionalTensor valid = contiguous(valid_mask);
  const Tensor weights = allocate(z, {shape.tokens, shape.experts}, compute_type(z));
  const Tensor inverse_rms = allocate(z, {shape.tokens}, compute_type(z));
  const Tensor partial = allocate(z, {shape.blocks(), shape.experts}, ScalarType::Long);
  const Tensor counts = allocate(z, {shape.experts}, ScalarType::Long);
  dispatch_floating(op, "logits", z, [&]<class S>() {
    using C = Compute<S>;
    run(z, shape.blocks(), shape.kBlock * shape.experts,
        ReluRmsGate<S>{shape, data<S>(z), data<C>(g), data<bool>(valid), mutable_data<C>(weights),
                       mutable_data<C>(inverse_rms), mutable_data<int64_t>(partial),
                       static_cast<C>(eps), static_cast<ReluNorm>(norm)});
  });
  run(z, shape.experts, shape.blocks(),
      ReluRmsGateCombine<int64_t, int64_t>{shape, data<int64_t>(partial),
                                           mutable_data<int64_t>(counts)});
  return {weights, inverse_rms, counts};
}

std::tuple<Tensor, Tensor> relu_rms_gate_backward(const Tensor& grad_weights, const Tensor& logits,
                                                  const Tensor& gain, double eps, int64_t norm,
                                                  const OptionalTensor& valid_mask) {
  constexpr auto op = "_relu_rms_gate_backward";
  const ReluRmsGateShape shape = check_arguments(op, logits, gain, eps, norm, valid_mask);
  check_tensor(op, "grad_weights", grad_weights, logits, compute_type(logits),
               has_shape(grad_weights, {shape.tokens, shape.experts}), Shape{logits.sizes()});
  const Tensor v = as_contiguous(grad_weights), z = as_contiguous(logits), g = as_contiguous(gain);
  const OptionalTensor valid = contiguous(valid_mask);
  const Tensor grad_logits = allocate(z, {shape.tokens, shape.experts});
  const Tensor partial = allocate(z, {shape.blocks(), shape.experts}, ScalarType::Double);
  const Tensor grad_gain = allocate(z, {shape.experts}, compute_type(z));
  dispatch_floating(op, "logits", z, [&]<class S>() {
    using C = Compute<S>;
    run(z, shape.blocks(), shape.kBlock * shape.experts,
        ReluRmsGateBackward<S>{shape, data<C>(v), data<S>(z), data<C>(g), data<bool>(valid),
                               mutable_data<S>(grad_logits), mutable_data<double>(partial),
                               static_cast<C>(eps), static_cast<ReluNorm>(norm)});
    run(z, shape.experts, shape.blocks(),
        ReluRmsGateCombine<double, C>{shape, data<double>(partial), mutable_data<C>(grad_gain)});
  });
  return {grad_logits, grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("relu_rms_gate(Tensor logits, Tensor gain, float eps, int norm, Tensor? valid_mask) -> "
        "(Tensor weights, Tensor inverse_rms, Tensor counts)");
  m.def("_relu_rms_gate_backward(Tensor grad_weights, Tensor logits, Tensor gain, float eps, "
        "int norm, Tensor? valid_mask) -> (Tensor grad_logits, Tensor grad_gain)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("relu_rms_gate", TORCH_BOX(&relu_rms_gate));
  m.impl("_relu_rms_gate_backward", TORCH_BOX(&relu_rms_gate_backward));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("relu_rms_gate", TORCH_BOX(&relu_rms_gate));
  m.impl("_relu_rms_gate_backward", TORCH_BOX(&relu_rms_gate_backward));
}
#endif

}  // namespace torch_routers
