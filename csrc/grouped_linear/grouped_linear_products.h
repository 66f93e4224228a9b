// torch's matrix products, as the operators of grouped_linear call them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <optional>

#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {

// A matrix in memory that outlives it. A tensor over given memory costs a tenth of a microsecond, a
// narrow() or select() through the dispatcher eight times that, for each group and operand.
template <class T>
Tensor matrix(const Tensor& like, const T* elements, std::int64_t rows, std::int64_t columns,
              std::int64_t row_stride, std::int64_t column_stride) {
  const std::array<std::int64_t, 2> sizes{rows, columns}, strides{row_stride, column_stride};
  return torch::stable::from_blob(const_cast<T*>(elements), sizes, strides, like.device(),
                                  like.scalar_type());
}

// out = a b, or out + a b.
inline void product(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  using torch::stable::detail::from, torch::stable::detail::to;
  if (out.is_cpu() && accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else if (out.is_cpu()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  } else {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    (void)to<Tensor>(stack[0]);  // owns the handle
  }
}

template <class... Arguments>
Tensor call_aten(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor slice(Tensor tensor, std::int64_t start, std::int64_t length) {
  return torch::stable::narrow(tensor, 0, start, length);
}

// ---- one product per group, the offsets being on the host --------------------------------------

// body(group, first row, number of rows) for each group that has rows.
template <class Body> void for_each_filled_group(const Tensor& offsets, const Body& body) {
  const auto* values = data<std::int64_t>(offsets);
  for (std::int64_t g = 0; g + 1 < offsets.size(0); ++g)
    if (values[g] < values[g + 1]) body(g, values[g], values[g + 1] - values[g]);
}

inline Tensor mm_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  const Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(1)});
  for_each_filled_group(offsets, [&](std::int64_t group, std::int64_t first, std::int64_t count) {
    product(slice(y, first, count), slice(x, first, count),
            torch::stable::transpose(torch::stable::select(weight, 0, group), 0, 1), false);
  });
  const std::int64_t end = data<std::int64_t>(offsets)[weight.size(0)];
  Tensor tail = slice(y, end, x.size(0) - end);
  torch::stable::zero_(tail);
  return y;
}

inline Tensor mm_outer(const Tensor& y, const Tensor& x, const Tensor& offsets) {
  const Tensor result = torch::stable::new_zeros(x, {offsets.size(0) - 1, y.size(1), x.size(1)});
  for_each_filled_group(offsets, [&](std::int64_t group, std::int64_t first, std::int64_t count) {
    product(torch::stable::select(result, 0, group),
            torch::stable::transpose(slice(y, first, count), 0, 1), slice(x, first, count), false);
  });
  return result;
}

// ---- grouped_mm, the offsets being where the rows are ------------------------------------------

// What grouped_mm asks of sizes and addresses.
constexpr std::size_t kAlignment = 16;

inline bool is_aligned(const Tensor& tensor, std::int64_t size) {
  return size > 0 && size * tensor.element_size() % kAlignment == 0;
}

inline Tensor aligned(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const auto last = sizes.size() - 1;
  const auto fits = [&](std::size_t dense, std::size_t other) {
    return strides[dense] == 1 && strides[other] >= sizes[dense] &&
           is_aligned(tensor, strides[other]);
  };
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  if ((fits(last, last - 1) || fits(last - 1, last)) && address % kAlignment == 0) return tensor;
  Tensor copy =
      torch::stable::new_empty(tensor, sizes);  // contiguous() keeps odd strides of one row
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The rows of each group times its own b; or, if b has rows too, a product per group.
inline Tensor grouped_mm(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  const Tensor ends = torch::stable::to(slice(offsets, 1, offsets.size(0) - 1), ScalarType::Int);
  return call_aten("aten::_grouped_mm", "", aligned(a), aligned(b), std::optional(ends),
                   std::optional<Tensor>(), std::optional<ScalarType>());
}

// y, and zero in the rows behind the last group, which grouped_mm does not write. Where they begin
// is not asked of the device.
inline Tensor without_tail(const Tensor& y, const Tensor& offsets) {
  const Tensor ones = torch::stable::full({y.size(0), 1}, 1, ScalarType::Long, {}, y.device());
  const Tensor number =
      call_aten("aten::cumsum", "", ones, std::int64_t{0}, std::optional<ScalarType>());
  const Tensor live =
      call_aten("aten::le", "Tensor", number, slice(offsets, offsets.size(0) - 1, 1));
  return call_aten("aten::where", "self", live, y, torch::stable::new_zeros(y, {1}));
}

inline Tensor grouped_mm_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  return without_tail(grouped_mm(x, torch::stable::transpose(weight, 1, 2), offsets), offsets);
}

}  // namespace torch_routers
