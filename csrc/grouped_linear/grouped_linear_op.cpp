// One matrix product per group of rows; group g has the rows [offsets[g], offsets[g + 1]).
//
//   grouped_linear   y[n] = weight[g] x[n] + bias[g]      [rows, out], 0 behind the last group
//   _grouped_outer   sum over its rows of outer(y[n], x[n])   [groups, out, in], 0 for an empty group
//
// Each of the two is the derivative of the other, so that the pair is closed under differentiation
// of any order. Rows behind the last group are never read.
#include <torch/csrc/stable/library.h>

#include "grouped_linear/grouped_linear_check.h"
#include "grouped_linear/grouped_linear_engine.h"

namespace torch_routers {
namespace {

using std::int64_t;
using Name = std::optional<Text>;
using torch::stable::transpose;

// Rows as the products want them: the elements of each side by side, no two in one place.
Tensor dense_rows(const Tensor& x) {
  return x.size(1) > 0 && (x.stride(1) != 1 || x.stride(0) < x.size(1))
             ? torch::stable::contiguous(x)
             : x;
}

// One of the two features of each weight has its elements side by side.
Tensor dense_weight(const Tensor& weight) {
  const bool dense = weight.stride(2) == 1 || weight.stride(1) == 1;
  return dense ? weight : torch::stable::contiguous(weight);
}

template <class T>
void linear(const Tensor& x, const Tensor& weight, const Tensor& offsets,
            const OptionalTensor& bias, Engine engine, const Tensor& y) {
  const Tensor a = dense_rows(x), w = dense_weight(weight);
  const auto b = contiguous(bias);
  linear<T>({y.size(1), x.size(1), data<int64_t>(offsets), data<T>(a), data<T>(w), data<T>(b),
             mutable_data<T>(y), a.stride(0), w.stride(0), w.stride(1), w.stride(2)},
            y, offsets, engine);
  const int64_t end = data<int64_t>(offsets)[offsets.size(0) - 1], tail = y.size(0) - end;
  std::fill_n(mutable_data<T>(y) + end * y.size(1), tail * y.size(1), T{});
}

template <class T>
void outer(const Tensor& y, const Tensor& x, const Tensor& offsets, Engine engine,
           const Tensor& result) {
  const Tensor a = dense_rows(y), b = dense_rows(x);
  outer<T>({y.size(1), x.size(1), data<int64_t>(offsets), data<T>(a), data<T>(b),
            mutable_data<T>(result), a.stride(0), b.stride(0)},
           result, offsets, engine);
}

// ---- operators ---------------------------------------------------------------------------------

Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets,
                      const OptionalTensor& bias, const Name& name) {
  constexpr auto op = "grouped_linear";
  check_linear(op, x, weight, offsets, bias);
  const int64_t rows = x.size(0), out = weight.size(1);
  const Engine engine = chosen_engine(op, name, x, x.size(1), out);
  const auto host =
      needs_host(x, engine) ? std::optional(host_offsets(op, offsets, rows)) : std::nullopt;
  Tensor y = torch::stable::new_empty(x, {rows, out});
  if (rows == 0) return y;
  if (x.is_cpu() && engine != Engine::GroupedMm) {
    dispatch_floating(op, "x", x, [&]<class T> { linear<T>(x, weight, *host, bias, engine, y); });
    return y;
  }
  const auto multiply = [&](const Tensor& a, const Tensor& w) {
    return engine == Engine::GroupedMm ? grouped_mm_linear(a, w, offsets) : mm_linear(a, w, *host);
  };
  y = multiply(x, weight);
  if (!bias) return y;
  // One more input, which is 1; more of them only for grouped_mm's alignment.
  const Tensor ones = torch::stable::full({rows, 8}, 1, x.scalar_type(), {}, x.device());
  const Tensor column = torch::stable::pad(torch::stable::unsqueeze(*bias, 2), {0, 7});
  return torch::stable::subtract(y, multiply(ones, column), -1);
}

Tensor grouped_outer(const Tensor& y, const Tensor& x, const Tensor& offsets, const Name& name) {
  constexpr auto op = "_grouped_outer";
  check(y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), op,
        ": expected y and x of shape [rows, features], got ", shape(y), " and ", shape(x));
  check_floating(op, "y", y);
  check_same_dtype(op, "y", y, "x", x);
  check_offsets(op, y, offsets);
  check_same_device(op, y, x);
  const Engine engine = chosen_engine(op, name, x, x.size(1), y.size(1));
  const auto host =
      needs_host(x, engine) ? std::optional(host_offsets(op, offsets, x.size(0))) : std::nullopt;
  const auto sizes = {offsets.size(0) - 1, y.size(1), x.size(1)};
  if (x.size(0) == 0) return torch::stable::new_zeros(x, sizes);
  if (engine == Engine::GroupedMm) return grouped_mm(transpose(aligned(y), 0, 1), x, offsets);
  if (!x.is_cpu()) return mm_outer(y, x, *host);
  const Tensor result = torch::stable::new_empty(x, sizes);
  dispatch_floating(op, "x", x, [&]<class T> { outer<T>(y, x, *host, engine, result); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("grouped_linear(Tensor x, Tensor weight, Tensor offsets, Tensor? bias=None, "
        "str? engine=None) -> Tensor");
  m.def("_grouped_outer(Tensor y, Tensor x, Tensor offsets, str? engine=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("_grouped_outer", TORCH_BOX(&grouped_outer));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("_grouped_outer", TORCH_BOX(&grouped_outer));
}
#endif

}  // namespace torch_routers
