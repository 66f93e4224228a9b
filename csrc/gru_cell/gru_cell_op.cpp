#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gru_cell/gru_cell_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {
namespace {

using std::int64_t;

// What both operators get; contiguous after `prepare`.
struct Inputs {
  const char* op;
  Tensor input_gates, hidden_gates, state;
  OptionalTensor valid_mask;

  int64_t tokens() const { return state.size(0); }
  int64_t size() const { return state.size(1); }

  void prepare() {
    check_shape(op, "state", state, state.dim() == 2, "[tokens, size]");
    dispatch_float_double(op, "state", state, []<class T> {});
    const auto check_gates = [&](const char* name, const Tensor& gates) {
      // No product that could overflow: a third of the columns.
      const bool fits = gates.dim() == 2 && gates.size(0) == tokens() && gates.size(1) % 3 == 0 &&
                        gates.size(1) / 3 == size();
      check_shape(op, name, gates, fits, "[tokens=", tokens(), ", 3 * size], size=", size());
      check_same_dtype(op, name, gates, "state", state);
      check_same_device(op, state, gates);
    };
    check_gates("input_gates", input_gates);
    check_gates("hidden_gates", hidden_gates);
    if (valid_mask)
      check_tensor(op, "valid_mask", *valid_mask, state, ScalarType::Bool,
                   has_shape(*valid_mask, {tokens()}), "[tokens=", tokens(), "]");
    input_gates = as_contiguous(input_gates);
    hidden_gates = as_contiguous(hidden_gates);
    state = as_contiguous(state);
    valid_mask = contiguous(valid_mask);
  }

  template <class T> GruStep<T> step() const {
    return {tokens(),
            size(),
            data<T>(input_gates),
            data<T>(hidden_gates),
            data<T>(state),
            data<bool>(valid_mask)};
  }

  template <class Params> void run(const Params& params) const {
    launch(
        state, tokens(), 3 * size(),
        [&](int64_t begin, int64_t end) { gru_cell_cpu(params, begin, end); },
        [&](void* stream) { gru_cell_cuda(params, stream); });
  }
};

Tensor gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& state,
                const OptionalTensor& valid_mask) {
  Inputs in{"gru_cell", input_gates, hidden_gates, state, valid_mask};
  in.prepare();
  const Tensor next = allocate(in.state, {in.tokens(), in.size()});
  dispatch_float_double(in.op, "state", in.state, [&]<class T>() {
    in.run(GruCell<T>{in.step<T>(), mutable_data<T>(next)});
  });
  return next;
}

std::tuple<Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad_next,
                                                     const Tensor& input_gates,
                                                     const Tensor& hidden_gates,
                                                     const Tensor& state,
                                                     const OptionalTensor& valid_mask) {
  constexpr auto op = "_gru_cell_backward";
  Inputs in{op, input_gates, hidden_gates, state, valid_mask};
  in.prepare();
  const int64_t tokens = in.tokens(), size = in.size();
  check_tensor(op, "grad_next", grad_next, in.state, in.state.scalar_type(),
               has_shape(grad_next, {tokens, size}), shape(in.state));
  const Tensor grad = as_contiguous(grad_next);
  const Tensor grad_input_gates = allocate(in.state, {tokens, 3 * size});
  const Tensor grad_hidden_gates = allocate(in.state, {tokens, 3 * size});
  const Tensor grad_state = allocate(in.state, {tokens, size});
  dispatch_float_double(op, "state", in.state, [&]<class T>() {
    in.run(GruCellBackward<T>{in.step<T>(), data<T>(grad), mutable_data<T>(grad_input_gates),
                              mutable_data<T>(grad_hidden_gates), mutable_data<T>(grad_state)});
  });
  return {grad_input_gates, grad_hidden_gates, grad_state};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("gru_cell(Tensor input_gates, Tensor hidden_gates, Tensor state, Tensor? valid_mask) "
        "-> Tensor");
  m.def("_gru_cell_backward(Tensor grad_next, Tensor input_gates, Tensor hidden_gates, "
        "Tensor state, Tensor? valid_mask) "
        "-> (Tensor grad_input_gates, Tensor grad_hidden_gates, Tensor grad_state)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("gru_cell", TORCH_BOX(&gru_cell));
  m.impl("_gru_cell_backward", TORCH_BOX(&gru_cell_backward));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("gru_cell", TORCH_BOX(&gru_cell));
  m.impl("_gru_cell_backward", TORCH_BOX(&gru_cell_backward));
}
#endif

}  // namespace torch_routers
