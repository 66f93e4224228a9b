#include <torch/csrc/stable/library.h>

#include "op/check.h"
#include "op/dispatch.h"
#include "ragged_select/ragged_select_kernel.h"

namespace torch_routers {
namespace {

using std::int64_t;

Tensor ragged_select(const Tensor& logits, const Tensor& order, int64_t rule, double top_p,
                     int64_t crossing, const OptionalTensor& thresholds,
                     const OptionalTensor& counts, int64_t least) {
  constexpr auto op = "ragged_select";
  check_shape(op, "logits", logits, logits.dim() == 2 && logits.size(1) >= 1,
              "[tokens, num_experts]");
  dispatch_float_double(op, "logits", logits, []<class T> {});
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_tensor(op, "order", order, logits, ScalarType::Long,
               order.dim() == 2 && order.size(0) == tokens, "[tokens=", tokens, ", slots]");
  check(0 <= rule && rule <= 3, op, ": expected rule in [0, 3], got ", rule);
  check(0 <= crossing && crossing <= 2, op, ": expected crossing in [0, 2], got ", crossing);
  check(top_p >= 0, op, ": expected top_p >= 0, got ", top_p);
  check(least >= 0, op, ": expected least >= 0, got ", least);
  const bool by_steps = rule == 1 || rule == 2;
  check(!by_steps || (thresholds && counts), op,
        ": expected thresholds and counts with this rule, got none");
  if (thresholds)
    check_tensor(op, "thresholds", *thresholds, logits, ScalarType::Double, thresholds->dim() == 1,
                 "[steps]");
  const int64_t steps = thresholds ? thresholds->size(0) : 0;
  if (counts)
    check_tensor(op, "counts", *counts, logits, ScalarType::Long, has_shape(*counts, {steps + 1}),
                 "[steps + 1=", steps + 1, "]");

  const Tensor z = as_contiguous(logits), given = as_contiguous(order);
  const OptionalTensor limits = contiguous(thresholds), numbers = contiguous(counts);
  const Tensor indices = allocate(z, {tokens, order.size(1)}, ScalarType::Long);
  dispatch_float_double(op, "logits", z, [&]<class T>() {
    const RaggedSelect<T> params{tokens,
                                 experts,
                                 order.size(1),
                                 data<T>(z),
                                 data<int64_t>(given),
                                 static_cast<RaggedRule>(rule),
                                 top_p,
                                 static_cast<Crossing>(crossing),
                                 least,
                                 steps,
                                 data<double>(limits),
                                 data<int64_t>(numbers),
                                 mutable_data<int64_t>(indices)};
    launch(
        z, tokens, 8 * experts,
        [&](int64_t begin, int64_t end) { ragged_select_cpu(params, begin, end); },
        [&](void* stream) { ragged_select_cuda(params, stream); });
  });
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("ragged_select(Tensor logits, Tensor order, int rule, float top_p, int crossing, "
        "Tensor? thresholds, Tensor? counts, int least) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("ragged_select", TORCH_BOX(&ragged_select));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("ragged_select", TORCH_BOX(&ragged_select));
}
#endif

}  // namespace torch_routers
