// One matrix product per group of rows; group e has the rows [offsets[e], offsets[e + 1]).
//
//   grouped_linear   y[n] = weight[e] x[n]                    [rows, out], 0 behind the last group
//   _grouped_outer   sum over its rows of outer(y[n], x[n])   [groups, out, in], 0 for an empty group
//
// The products are torch's. Each of the two operators is the derivative of the other, so that the
// pair is closed under differentiation of any order. Rows behind the last group are never read.
#include <torch/csrc/stable/library.h>

#include <array>

#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {
namespace {

using std::int64_t;
using torch::stable::narrow, torch::stable::select, torch::stable::transpose;

void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)to<Tensor>(stack[0]);  // owns the handle
}

void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
            type == ScalarType::Half,
        op, ": expected ", argument, " in float32, float64, bfloat16 or float16, got ",
        dtype(tensor));
}

// The offsets on the CPU: which rows belong together decides which products are launched.
Tensor checked_offsets(const char* op, const Tensor& offsets, int64_t rows) {
  check(offsets.scalar_type() == ScalarType::Long, op, ": expected offsets in int64, got ",
        dtype(offsets));
  check(offsets.dim() == 1 && offsets.size(0) >= 2, op,
        ": expected offsets of shape [num_experts + 1], got ", shape(offsets));
  Tensor host = torch::stable::contiguous(offsets);
  if (!host.is_cpu())
    host = torch::stable::to(host, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const int64_t* values = data<int64_t>(host);
  const int64_t groups = host.size(0) - 1;
  check(values[0] == 0 && values[groups] <= rows, op, ": expected offsets from 0 to at most ", rows,
        ", the number of rows, got ", values[0], " to ", values[groups]);
  for (int64_t g = 0; g < groups; ++g)
    check(values[g] <= values[g + 1], op, ": expected offsets in ascending order, got ",
          values[g + 1], " after ", values[g]);
  return host;
}

// body(group, first row, number of rows) for each group that has rows.
template <class Body> void for_each_group(const Tensor& offsets, const Body& body) {
  const int64_t* values = data<int64_t>(offsets);
  for (int64_t g = 0; g + 1 < offsets.size(0); ++g)
    if (values[g] < values[g + 1]) body(g, values[g], values[g + 1] - values[g]);
}

Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  constexpr auto op = "grouped_linear";
  check(x.dim() == 2, op, ": expected x of shape [rows, in_features], got ", shape(x));
  check_floating(op, "x", x);
  check(weight.dim() == 3 && weight.size(2) == x.size(1), op,
        ": expected weight of shape [num_experts, out_features, in_features=", x.size(1), "], got ",
        shape(weight));
  check(weight.scalar_type() == x.scalar_type(), op, ": expected weight in the dtype of x, ",
        dtype(x), ", got ", dtype(weight));
  check(offsets.dim() != 1 || offsets.size(0) == weight.size(0) + 1, op,
        ": expected offsets of shape [num_experts + 1], here [", weight.size(0) + 1, "], got ",
        shape(offsets));
  check_same_device(op, x, weight);
  check_same_device(op, x, offsets);
  const int64_t rows = x.size(0);
  const Tensor host = checked_offsets(op, offsets, rows);

  Tensor rows_in = x, y = torch::stable::new_empty(x, {rows, weight.size(1)});
  for_each_group(host, [&](int64_t group, int64_t first, int64_t count) {
    mm_out(narrow(y, 0, first, count), narrow(rows_in, 0, first, count),
           transpose(select(weight, 0, group), 0, 1));
  });
  const int64_t end = data<int64_t>(host)[weight.size(0)];
  Tensor tail = narrow(y, 0, end, rows - end);
  torch::stable::zero_(tail);
  return y;
}

Tensor grouped_outer(const Tensor& y, const Tensor& x, const Tensor& offsets) {
  constexpr auto op = "_grouped_outer";
  check(y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), op,
        ": expected y and x of shape [rows, features], got ", shape(y), " and ", shape(x));
  check_floating(op, "y", y);
  check(y.scalar_type() == x.scalar_type(), op, ": expected y in the dtype of x, ", dtype(x),
        ", got ", dtype(y));
  check_same_device(op, y, x);
  check_same_device(op, y, offsets);
  const Tensor host = checked_offsets(op, offsets, x.size(0));

  Tensor y_rows = y, x_rows = x;
  Tensor result = torch::stable::new_zeros(x, {host.size(0) - 1, y.size(1), x.size(1)});
  for_each_group(host, [&](int64_t group, int64_t first, int64_t count) {
    mm_out(select(result, 0, group), transpose(narrow(y_rows, 0, first, count), 0, 1),
           narrow(x_rows, 0, first, count));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor");
  m.def("_grouped_outer(Tensor y, Tensor x, Tensor offsets) -> Tensor");
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
