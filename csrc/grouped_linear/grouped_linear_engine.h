// Which engine multiplies and, on the CPU, which thread computes which outputs of which group.
#pragma once

#include "grouped_linear/grouped_linear_kernel.h"
#include "grouped_linear/grouped_linear_products.h"
#include "op/text.h"

namespace torch_routers {

enum class Engine { Automatic, Mm, GroupedMm, Native };

inline Engine chosen_engine(const char* op, const std::optional<Text>& name, const Tensor& x,
                            std::int64_t in, std::int64_t out) {
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

inline bool needs_host(const Tensor& x, Engine engine) {
  return x.is_cpu() || engine != Engine::GroupedMm;
}

// ---- on the CPU --------------------------------------------------------------------------------

// Where the kernels here were measured to be faster than torch's product: for few rows, and for so
// few multiplications that the call is what takes the time.
constexpr std::int64_t kFewMultiplications = 1 << 18;
struct FewRows {
  std::int64_t linear, transposed, outer;
};
template <class T> constexpr FewRows kFewRows{32, 4, 16};
template <> constexpr FewRows kFewRows<double>{32, 32, 32};
template <> constexpr FewRows kFewRows<BFloat16>{1, 1, 0};

// torch's product of float16 is a slow one where the processor cannot multiply it.
inline bool multiplies_float16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512fp16");
#else
  return true;
#endif
}

template <class T>
bool is_native(Engine engine, std::int64_t few, std::int64_t rows, std::int64_t in,
               std::int64_t out) {
  if (engine != Engine::Automatic) return engine == Engine::Native;
  if (std::is_same_v<T, Float16> && !multiplies_float16()) return true;
  return rows <= few || rows * in * out <= kFewMultiplications;
}

// body(group, begin, end) for ranges of the outputs of every group, on torch's threads. An output
// costs `inputs` elements for each row of its group, and for each of `extra`.
template <class Body>
void for_each_group(const Tensor& like, const Tensor& offsets, std::int64_t outputs,
                    std::int64_t inputs, std::int64_t extra, const Body& body) {
  constexpr std::int64_t kBlock = 16;  // of outputs, which one thread computes
  const std::int64_t* first = data<std::int64_t>(offsets);
  const std::int64_t groups = offsets.size(0) - 1, blocks = (outputs + kBlock - 1) / kBlock;
  const auto start = [&](std::int64_t group) { return (first[group] + extra * group) * blocks; };
  launch(
      like, start(groups), inputs * kBlock,
      [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t g = 0; g < groups; ++g) {
          const std::int64_t units = first[g + 1] - first[g] + extra;
          if (units == 0 || start(g + 1) <= begin || start(g) >= end) continue;
          const auto block = [&](std::int64_t unit) {
            return std::clamp<std::int64_t>((unit - start(g) + units - 1) / units, 0, blocks);
          };
          const std::int64_t from = block(std::max(begin, start(g))) * kBlock;
          const std::int64_t to = std::min(block(end) * kBlock, outputs);
          if (from < to) body(g, from, to);
        }
      },
      [](void*) {});
}

template <class T>
void linear(const GroupedLinear<T>& p, const Tensor& y, const Tensor& offsets, Engine engine) {
  const std::int64_t few = p.weight_input == 1 ? kFewRows<T>.linear : kFewRows<T>.transposed;
  for_each_group(y, offsets, p.outputs, p.inputs, 0,
                 [&](std::int64_t g, std::int64_t begin, std::int64_t end) {
                   const std::int64_t first = p.offsets[g], rows = p.offsets[g + 1] - first;
                   if (is_native<T>(engine, few, rows, p.inputs, p.outputs))
                     return grouped_cpu(p, g, begin, end);
                   T* out = p.y + first * p.outputs + begin;
                   const T* bias = p.bias ? p.bias + g * p.outputs : nullptr;
                   for (std::int64_t n = 0; bias && n < rows; ++n)
                     std::copy(bias + begin, bias + end, out + n * p.outputs);
                   product(matrix(y, out, rows, end - begin, p.outputs, 1),
                           matrix(y, p.x + first * p.x_stride, rows, p.inputs, p.x_stride, 1),
                           matrix(y, p.weight + g * p.weight_group + begin * p.weight_output,
                                  p.inputs, end - begin, p.weight_input, p.weight_output),
                           bias);
                 });
}

template <class T>
void outer(const GroupedOuter<T>& p, const Tensor& result, const Tensor& offsets, Engine engine) {
  for_each_group(
      result, offsets, p.outputs, p.inputs, 1,
      [&](std::int64_t g, std::int64_t begin, std::int64_t end) {
        const std::int64_t first = p.offsets[g], rows = p.offsets[g + 1] - first;
        if (rows == 0 || is_native<T>(engine, kFewRows<T>.outer, rows, p.inputs, p.outputs))
          return grouped_cpu(p, g, begin, end);
        product(matrix(result, p.result + (g * p.outputs + begin) * p.inputs, end - begin, p.inputs,
                       p.inputs, 1),
                matrix(result, p.y + first * p.y_stride + begin, end - begin, rows, 1, p.y_stride),
                matrix(result, p.x + first * p.x_stride, rows, p.inputs, p.x_stride, 1), false);
      });
}

}  // namespace torch_routers
