// What `lora_mix` is made of; see lora_mix_kernel.h. The rows are those of a dispatch plan.
//
//   _lora_shrink   x, weight -> z           _lora_expand   z, weight -> y
//   _lora_outer    z, x -> the sum over the rows of each expert
//
// Each one's derivatives are the other two, so that the three are closed under differentiation.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/vector.h"
#include "lora_mix/lora_mix_plan.h"

namespace torch_routers {
namespace {

using std::int64_t;

// Rows side by side. A stack of transposed factors is what comes here, of which torch's copy takes
// several times as long.
Tensor as_rows(const Tensor& weight) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (weight.is_contiguous() || !weight.is_cpu() || weight.scalar_type() != ScalarType::Float ||
      weight.stride(0) != 1)
    return as_contiguous(weight);
  const Tensor result = allocate(weight, {rows, columns});
  const auto* from = data<float>(weight);
  auto* to = mutable_data<float>(result);
  const int64_t stride = weight.stride(1);
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t c = 0; c < columns; c += 4) {
      if (r + 4 <= rows && c + 4 <= columns) {
        transpose_4x4(from + c * stride + r, stride, to + r * columns + c, columns);
        continue;
      }
      for (int64_t i = r; i < std::min(r + 4, rows); ++i)
        for (int64_t j = c; j < std::min(c + 4, columns); ++j)
          to[i * columns + j] = from[j * stride + i];
    }
  return result;
}

// `cost` of one of `count`, in elements.
template <class Params>
void run(const Tensor& like, const Params& params, const std::vector<int64_t>& of_row,
         int64_t count, int64_t cost) {
  launch(
      like, count, cost,
      [&](int64_t begin, int64_t end) { lora_mix_cpu(params, of_row.data(), begin, end); },
      [&](void* stream) { lora_mix_cuda(params, stream); });
}

Tensor lora_shrink(const Tensor& x, const Tensor& weight, const Tensor& order,
                   const Tensor& inverse, const Tensor& offsets, const Tensor& ranks,
                   int64_t max_rank) {
  const char* op = "_lora_shrink";
  LoraPlan plan{op, order, inverse, offsets, ranks, max_rank};
  check_tokens(plan, "x", x);
  check_weight(plan, weight, x);
  const int64_t features = x.size(1);
  check_shape(op, "weight", weight, weight.size(1) == features,
              "[sum of ranks, features=", features, "]");
  plan.prepare(x, weight.size(0));
  check_token_number(plan, x);
  const Tensor a = as_contiguous(x), w = as_rows(weight);
  const Tensor z = allocate(x, {plan.rows(), max_rank});
  const auto tokens = x.is_cpu() ? plan.tokens_of_rows() : std::vector<int64_t>();
  dispatch_floating(plan.op, "x", x, [&]<class T>() {
    const LoraShrink<T> params{plan.params(features), data<T>(a), data<T>(w), mutable_data<T>(z)};
    run(x, params, tokens, plan.rows(), cost_of(plan, features, plan.rows()));
  });
  return z;
}

Tensor lora_expand(const Tensor& z, const Tensor& weight, const Tensor& order,
                   const Tensor& inverse, const Tensor& offsets, const Tensor& ranks) {
  const char* op = "_lora_expand";
  check_shape(op, "z", z, z.dim() == 2, "[rows, max_rank]");
  check_floating(op, "z", z);
  LoraPlan plan{op, order, inverse, offsets, ranks, z.size(1)};
  check_weight(plan, weight, z);
  plan.prepare(z, weight.size(0));
  check_z(plan, z, z);
  const int64_t features = weight.size(1);
  const Tensor a = as_contiguous(z), w = as_rows(weight);
  const Tensor y = allocate(z, {plan.tokens(), features});
  const auto experts = z.is_cpu() ? plan.experts_of_rows() : std::vector<int64_t>();
  dispatch_floating(plan.op, "z", z, [&]<class T>() {
    const LoraExpand<T> params{plan.params(features), data<T>(a), data<T>(w), mutable_data<T>(y)};
    run(z, params, experts, plan.tokens(), cost_of(plan, features, plan.tokens()));
  });
  return y;
}

Tensor lora_outer(const Tensor& z, const Tensor& x, const Tensor& order, const Tensor& inverse,
                  const Tensor& offsets, const Tensor& ranks, int64_t size) {
  const char* op = "_lora_outer";
  check_shape(op, "z", z, z.dim() == 2, "[rows, max_rank]");
  LoraPlan plan{op, order, inverse, offsets, ranks, z.size(1)};
  check_tokens(plan, "x", x);
  check(size >= 0, plan.op, ": expected size >= 0, got ", size);
  plan.prepare(x, size);
  check_token_number(plan, x);
  check_z(plan, z, x);
  const int64_t features = x.size(1);
  const Tensor a = as_contiguous(z), b = as_contiguous(x);
  const Tensor result = allocate(x, {size, features});
  const auto tokens = x.is_cpu() ? plan.tokens_of_rows() : std::vector<int64_t>();
  dispatch_floating(plan.op, "x", x, [&]<class T>() {
    const LoraOuter<T> params{plan.params(features), data<T>(a), data<T>(b),
                              mutable_data<T>(result)};
    run(x, params, tokens, features, plan.rows() * plan.max_rank + size);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("_lora_shrink(Tensor x, Tensor weight, Tensor order, Tensor inverse, Tensor offsets, "
        "Tensor ranks, int max_rank) -> Tensor");
  m.def("_lora_expand(Tensor z, Tensor weight, Tensor order, Tensor inverse, Tensor offsets, "
        "Tensor ranks) -> Tensor");
  m.def("_lora_outer(Tensor z, Tensor x, Tensor order, Tensor inverse, Tensor offsets, "
        "Tensor ranks, int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("_lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("_lora_expand", TORCH_BOX(&lora_expand));
  m.impl("_lora_outer", TORCH_BOX(&lora_outer));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("_lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("_lora_expand", TORCH_BOX(&lora_expand));
  m.impl("_lora_outer", TORCH_BOX(&lora_outer));
}
#endif

}  // namespace torch_routers
