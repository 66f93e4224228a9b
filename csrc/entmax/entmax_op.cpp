#include <torch/csrc/stable/library.h>

#include <tuple>

#include "entmax/entmax_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {
namespace {

using std::int64_t;

template <class Params>
void run(const Tensor& on, int64_t count, int64_t cost, const Params& params) {
  launch(
      on, count, cost, [&](int64_t begin, int64_t end) { entmax_cpu(params, begin, end); },
      [&](void* stream) { entmax_cuda(params, stream); });
}

ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What is in a tensor is checked on the CPU only: on CUDA it would cost a synchronisation.
void check_alpha(const char* op, const Tensor& first, const OptionalTensor& learned, double alpha) {
  if (learned) {
    check_tensor(op, "alpha", *learned, first, compute_type(first), learned->dim() == 0, "[]");
    if (!learned->is_cpu()) return;
    alpha = compute_type(first) == ScalarType::Double ? *data<double>(learned)
                                                      : double{*data<float>(learned)};
  }
  check(alpha >= 1 && alpha - alpha == 0, op, ": expected a finite alpha >= 1, got ", alpha);
}

std::tuple<Tensor, Tensor> entmax(const Tensor& logits, const OptionalTensor& learned, double alpha,
                                  const OptionalTensor& valid_mask) {
  constexpr auto op = "entmax";
  check_shape(op, "logits", logits, logits.dim() == 2 && logits.size(1) >= 1,
              "[..., num_experts] with num_experts >= 1");
  check_floating(op, "logits", logits);
  const EntmaxShape shape{logits.size(0), logits.size(1)};
  if (valid_mask)
    check_tensor(op, "valid_mask", *valid_mask, logits, ScalarType::Bool,
                 has_shape(*valid_mask, {shape.tokens}), "[", shape.tokens,
                 "], one value per token");
  check_alpha(op, logits, learned, alpha);

  const Tensor x = as_contiguous(logits);
  const OptionalTensor valid = contiguous(valid_mask);
  const Tensor weights = allocate(x, {shape.tokens, shape.experts}, compute_type(x));
  const Tensor counts = allocate(x, {shape.experts}, ScalarType::Long);
  const bool combines = shape.blocks() != 1;  // the counts of a single block are all
  const Tensor partial =
      combines ? allocate(x, {shape.blocks(), shape.experts}, ScalarType::Long) : counts;
  dispatch_floating(op, "logits", x, [&]<class S>() {
    using C = Compute<S>;
    run(x, shape.blocks(), 8 * shape.kBlock * shape.experts,
        Entmax<S>{shape,
                  data<S>(x),
                  data<bool>(valid),
                  {data<C>(learned), alpha},
                  mutable_data<C>(weights),
                  mutable_data<int64_t>(partial)});
  });
  if (combines)
    run(x, shape.experts, shape.blocks(),
        EntmaxCounts{shape, data<int64_t>(partial), mutable_data<int64_t>(counts)});
  return {weights, counts};
}

// The gradients of the logits, and of alpha: [0] where it is not learned.
std::tuple<Tensor, Tensor> entmax_backward(const Tensor& grad_weights, const Tensor& weights,
                                           const OptionalTensor& learned, double alpha) {
  constexpr auto op = "_entmax_backward";
  check_shape(op, "weights", weights, weights.dim() == 2, "[tokens, num_experts]");
  check_same_dtype(op, "grad_weights", grad_weights, "weights", weights);
  check_shape(op, "grad_weights", grad_weights,
              has_shape(grad_weights, {weights.size(0), weights.size(1)}),
              torch_routers::shape(weights), ", that of weights");
  check_same_device(op, weights, grad_weights);
  const Tensor g = as_contiguous(grad_weights), w = as_contiguous(weights);
  const EntmaxShape shape{w.size(0), w.size(1)};
  const Tensor grad_logits = allocate(w, {shape.tokens, shape.experts});
  const Tensor grad_alpha = learned ? allocate(w, {}) : allocate(w, {0});
  OptionalTensor partial;
  if (learned) partial = allocate(w, {shape.blocks()}, ScalarType::Double);
  dispatch_float_double(op, "weights", w, [&]<class C>() {
    check_alpha(op, w, learned, alpha);
    run(w, shape.blocks(), shape.kBlock * shape.experts,
        EntmaxBackward<C>{shape,
                          data<C>(g),
                          data<C>(w),
                          {data<C>(learned), alpha},
                          mutable_data<C>(grad_logits),
                          mutable_data<double>(partial)});
    if (learned)
      run(w, 1, 1, EntmaxAlphaSum<C>{shape, data<double>(partial), mutable_data<C>(grad_alpha)});
  });
  return {grad_logits, grad_alpha};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("entmax(Tensor logits, Tensor? learned_alpha, float alpha, Tensor? valid_mask) -> "
        "(Tensor weights, Tensor counts)");
  m.def("_entmax_backward(Tensor grad_weights, Tensor weights, Tensor? learned_alpha, "
        "float alpha) -> (Tensor grad_logits, Tensor grad_alpha)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("entmax", TORCH_BOX(&entmax));
  m.impl("_entmax_backward", TORCH_BOX(&entmax_backward));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("entmax", TORCH_BOX(&entmax));
  m.impl("_entmax_backward", TORCH_BOX(&entmax_backward));
}
#endif

}  // namespace torch_routers
