// One matrix product per group of rows; group g has the rows [offsets[g], offsets[g + 1]).
//
//   grouped_linear   y[n] = weight[g] x[n] + bias[g]      [rows, out], 0 behind the last group
//   _grouped_outer   sum over its rows of outer(y[n], x[n])   [groups, out, in], 0 for an empty group
//
// Each of the two is the derivative of the other, so that the pair is closed under differentiation
// of any order. Rows behind the last group are never read.
#include <torch/csrc/stable/library.h>

#include <string>

#include "grouped_linear/grouped_linear_kernel.h"
#include "grouped_linear/grouped_linear_products.h"

namespace torch_routers {
namespace {

using std::int64_t;
using Name = std::optional<std::string>;
using torch::stable::transpose;
const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

// ---- checks ------------------------------------------------------------------------------------

void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  dispatch_floating(op, argument, tensor, []<class T> {});
}

void check_offsets(const char* op, const Tensor& offsets) {
  check(offsets.scalar_type() == ScalarType::Long, op, ": expected offsets in int64, got ",
        dtype(offsets));
  check(offsets.dim() == 1 && offsets.size(0) >= 2, op,
        ": expected offsets of shape [num_experts + 1], got ", shape(offsets));
}

enum class Engine { Automatic, Mm, GroupedMm, Native };

Engine chosen_engine(const char* op, const Name& name, const Tensor& x, int64_t in, int64_t out) {
  const bool grouped_mm =
      x.scalar_type() != ScalarType::Double && is_aligned(x, in) && is_aligned(x, out);
  if (!name) {
    const bool without_host = !x.is_cpu() && x.scalar_type() == ScalarType::BFloat16 && grouped_mm;
    return without_host ? Engine::GroupedMm : x.is_cpu() ? Engine::Automatic : Engine::Mm;
  }
  if (*name == "mm") return Engine::Mm;
  if (*name == "grouped_mm" && grouped_mm) return Engine::GroupedMm;
  if (*name == "native" && x.is_cpu()) return Engine::Native;
  check(false, op, ": expected engine among mm", grouped_mm ? ", grouped_mm" : "",
        x.is_cpu() ? ", native" : "", " for in_features=", in, " and out_features=", out, " in ",
        dtype(x), ", got ", *name);
  return Engine::Automatic;
}

bool needs_host(const Tensor& x, Engine engine) {
  return x.is_cpu() || engine != Engine::GroupedMm;
}

// The offsets on the CPU, where their values are checked: which rows belong together decides which
// products are launched.
Tensor host_offsets(const char* op, const Tensor& offsets, int64_t rows) {
  const Tensor host =
      torch::stable::contiguous(offsets.is_cpu() ? offsets : torch::stable::to(offsets, kCpu));
  const int64_t* values = data<int64_t>(host);
  const int64_t groups = host.size(0) - 1;
  check(values[0] == 0 && values[groups] <= rows, op, ": expected offsets from 0 to at most ", rows,
        ", the number of rows, got ", values[0], " to ", values[groups]);
  for (int64_t g = 0; g < groups; ++g)
    check(values[g] <= values[g + 1], op, ": expected offsets in ascending order, got ",
          values[g + 1], " after ", values[g]);
  return host;
}

// ---- which rows, which outputs -----------------------------------------------------------------

// body(group, begin, end) for ranges of the outputs of every group, on torch's threads. An output
// costs `inputs` elements for each row of its group, and for each of `extra`.
template <class Body>
void for_each_group(const Tensor& like, const Tensor& offsets, int64_t outputs, int64_t inputs,
                    int64_t extra, const Body& body) {
  constexpr int64_t kBlock = 16;  // of outputs, which one thread computes
  const int64_t* first = data<int64_t>(offsets);
  const int64_t groups = offsets.size(0) - 1, blocks = (outputs + kBlock - 1) / kBlock;
  const auto start = [&](int64_t group) { return (first[group] + extra * group) * blocks; };
  launch(
      like, start(groups), inputs * kBlock,
      [&](int64_t begin, int64_t end) {
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t units = first[g + 1] - first[g] + extra;
          if (units == 0 || start(g + 1) <= begin || start(g) >= end) continue;
          const auto block = [&](int64_t unit) {
            return std::clamp<int64_t>((unit - start(g) + units - 1) / units, 0, blocks);
          };
          const int64_t from = block(std::max(begin, start(g))) * kBlock;
          const int64_t to = std::min(block(end) * kBlock, outputs);
          if (from < to) body(g, from, to);
        }
      },
      [](void*) {});
}

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

// ---- on the CPU --------------------------------------------------------------------------------

// Where the kernels here were measured to be faster than torch's product: for few rows, and for so
// few multiplications that the call is what takes the time.
constexpr int64_t kFewMultiplications = 1 << 18;
struct FewRows {
  int64_t linear, transposed, outer;
};
template <class T> constexpr FewRows kFewRows{32, 4, 16};
template <> constexpr FewRows kFewRows<double>{32, 32, 32};
template <> constexpr FewRows kFewRows<BFloat16>{1, 1, 0};

// torch's product of float16 is a slow one where the processor cannot multiply it.
bool multiplies_float16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512fp16");
#else
  return true;
#endif
}

template <class T>
bool is_native(Engine engine, int64_t few, int64_t rows, int64_t in, int64_t out) {
  if (engine != Engine::Automatic) return engine == Engine::Native;
  if (std::is_same_v<T, Float16> && !multiplies_float16()) return true;
  return rows <= few || rows * in * out <= kFewMultiplications;
}

template <class T>
void linear(const GroupedLinear<T>& p, const Tensor& y, const Tensor& offsets, Engine engine) {
  const int64_t few = p.weight_input == 1 ? kFewRows<T>.linear : kFewRows<T>.transposed;
  for_each_group(y, offsets, p.outputs, p.inputs, 0, [&](int64_t g, int64_t begin, int64_t end) {
    const int64_t first = p.offsets[g], rows = p.offsets[g + 1] - first;
    if (is_native<T>(engine, few, rows, p.inputs, p.outputs)) return grouped_cpu(p, g, begin, end);
    T* out = p.y + first * p.outputs + begin;
    const T* bias = p.bias ? p.bias + g * p.outputs : nullptr;
    for (int64_t n = 0; bias && n < rows; ++n)
      std::copy(bias + begin, bias + end, out + n * p.outputs);
    product(matrix(y, out, rows, end - begin, p.outputs, 1),
            matrix(y, p.x + first * p.x_stride, rows, p.inputs, p.x_stride, 1),
            matrix(y, p.weight + g * p.weight_group + begin * p.weight_output, p.inputs,
                   end - begin, p.weight_input, p.weight_output),
            bias);
  });
}

template <class T>
void outer(const GroupedOuter<T>& p, const Tensor& result, const Tensor& offsets, Engine engine) {
  for_each_group(
      result, offsets, p.outputs, p.inputs, 1, [&](int64_t g, int64_t begin, int64_t end) {
        const int64_t first = p.offsets[g], rows = p.offsets[g + 1] - first;
        if (rows == 0 || is_native<T>(engine, kFewRows<T>.outer, rows, p.inputs, p.outputs))
          return grouped_cpu(p, g, begin, end);
        product(matrix(result, p.result + (g * p.outputs + begin) * p.inputs, end - begin, p.inputs,
                       p.inputs, 1),
                matrix(result, p.y + first * p.y_stride + begin, end - begin, rows, 1, p.y_stride),
                matrix(result, p.x + first * p.x_stride, rows, p.inputs, p.x_stride, 1), false);
      });
}

template <class T>
void linear(const Tensor& x, const Tensor& weight, const Tensor& offsets,
            const std::optional<Tensor>& bias, Engine engine, const Tensor& y) {
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

void check_linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor& offsets,
                  const std::optional<Tensor>& bias) {
  check(x.dim() == 2, op, ": expected x of shape [rows, in_features], got ", shape(x));
  check_floating(op, "x", x);
  check(weight.dim() == 3 && weight.size(2) == x.size(1), op,
        ": expected weight of shape [num_experts, out_features, in_features=", x.size(1), "], got ",
        shape(weight));
  check(weight.scalar_type() == x.scalar_type(), op, ": expected weight in the dtype of x, ",
        dtype(x), ", got ", dtype(weight));
  const int64_t groups = weight.size(0), out = weight.size(1);
  check(offsets.dim() != 1 || offsets.size(0) == groups + 1, op,
        ": expected offsets of shape [num_experts + 1], here [", groups + 1, "], got ",
        shape(offsets));
  check_offsets(op, offsets);
  if (bias) {
    check(has_shape(*bias, {groups, out}), op, ": expected bias of shape [num_experts=", groups,
          ", out_features=", out, "], got ", shape(*bias));
    check(bias->scalar_type() == x.scalar_type(), op, ": expected bias in the dtype of x, ",
          dtype(x), ", got ", dtype(*bias));
  }
  check_same_device(op, x, weight);
  check_same_device(op, x, offsets);
  check_same_device(op, x, bias);
}

Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets,
                      const std::optional<Tensor>& bias, const Name& name) {
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
  check(y.scalar_type() == x.scalar_type(), op, ": expected y in the dtype of x, ", dtype(x),
        ", got ", dtype(y));
  check_offsets(op, offsets);
  check_same_device(op, y, x);
  check_same_device(op, y, offsets);
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
