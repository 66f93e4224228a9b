// What `lora_mix` is made of; see lora_mix_kernel.h. The rows are those of a dispatch plan.
//
//   _lora_shrink   x, weight -> z           _lora_expand   z, weight -> y
//   _lora_outer    z, x -> the sum over the rows of each expert
//
// Each one's derivatives are the other two, so that the three are closed under differentiation.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "lora_mix/lora_mix_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {
namespace {

using std::int64_t;

// The rows of all experts; contiguous after `prepare`.
struct Plan {
  const char* op;
  Tensor order, inverse, offsets, ranks;
  int64_t max_rank;

  int64_t rows() const { return order.size(0); }
  int64_t tokens() const { return inverse.size(0); }
  int64_t slots() const { return inverse.size(1); }
  int64_t experts() const { return offsets.size(0) - 1; }

  // `size`: the rows of the weight, if there is one.
  void prepare(const Tensor& values, std::optional<int64_t> size) {
    check_tensor(op, "order", order, values, ScalarType::Long, order.dim() == 1, "[rows]");
    check_tensor(op, "inverse", inverse, values, ScalarType::Long, inverse.dim() == 2,
                 "[tokens, slots]");
    check_tensor(op, "offsets", offsets, values, ScalarType::Long, is_offsets(offsets),
                 "[num_experts + 1]");
    check_tensor(op, "ranks", ranks, values, ScalarType::Long, has_shape(ranks, {experts() + 1}),
                 "[num_experts + 1], here [", experts() + 1, "]");
    check(max_rank >= 0, op, ": expected max_rank >= 0, got ", max_rank);
    for (Tensor* tensor : {&order, &inverse, &offsets, &ranks}) *tensor = as_contiguous(*tensor);
    if (values.is_cpu()) check_values(size);
  }

  // The kernels follow them: nothing may lie outside.
  void check_values(std::optional<int64_t> size) const {
    check_offset_values(op, "offsets", offsets, rows(), true, "at most ", rows(),
                        ", the number of rows");
    const int64_t total = size.value_or(data<int64_t>(ranks)[experts()]);
    check_offset_values(op, "ranks", ranks, total, false, total, ", the rows of the weight");
    for (int64_t e = 0; e < experts(); ++e) {
      const int64_t rank = data<int64_t>(ranks)[e + 1] - data<int64_t>(ranks)[e];
      check(rank <= max_rank, op, ": expected ranks of at most max_rank=", max_rank, ", got ",
            rank);
    }
    const int64_t live = data<int64_t>(offsets)[experts()];
    const auto check_range = [&](const char* name, const Tensor& of, int64_t count, int64_t low,
                                 int64_t high) {
      const auto* values = data<int64_t>(of);
      for (int64_t i = 0; i < count; ++i)
        check(values[i] >= low && values[i] < high, op, ": expected ", name, " in [", low, ", ",
              high, "), got ", values[i]);
    };
    check_range("order", order, live, 0, tokens() * slots());
    check_range("inverse", inverse, tokens() * slots(), -1, live);
  }

  LoraRows params(int64_t features) const {
    return {tokens(),
            slots(),
            experts(),
            rows(),
            features,
            max_rank,
            data<int64_t>(order),
            data<int64_t>(inverse),
            data<int64_t>(offsets),
            data<int64_t>(ranks)};
  }

  // On the CPU, for the rows that have one.
  std::vector<int64_t> tokens_of_rows() const {
    std::vector<int64_t> result(rows());
    const int64_t live = data<int64_t>(offsets)[experts()];
    for (int64_t r = 0; r < live; ++r) result[r] = data<int64_t>(order)[r] / slots();
    return result;
  }
  std::vector<int64_t> experts_of_rows() const {
    std::vector<int64_t> result(rows());
    const auto* first = data<int64_t>(offsets);
    for (int64_t e = 0; e < experts(); ++e)
      std::fill(result.begin() + first[e], result.begin() + first[e + 1], e);
    return result;
  }
};

// `cost` of one of `count`, in elements.
template <class Params>
void run(const Tensor& like, const Params& params, const std::vector<int64_t>& of_row,
         int64_t count, int64_t cost) {
  launch(
      like, count, cost,
      [&](int64_t begin, int64_t end) { lora_mix_cpu(params, of_row.data(), begin, end); },
      [&](void* stream) { lora_mix_cuda(params, stream); });
}

void check_tokens(const Plan& plan, const char* name, const Tensor& x) {
  check_shape(plan.op, name, x, x.dim() == 2, "[tokens, features]");
  check_floating(plan.op, name, x);
}

void check_token_number(const Plan& plan, const Tensor& x) {
  check(x.size(0) == plan.tokens(), plan.op, ": expected x with ", plan.tokens(),
        " tokens, those of the plan, got ", x.size(0));
}

void check_z(const Plan& plan, const Tensor& z, const Tensor& like) {
  check_tensor(plan.op, "z", z, like, like.scalar_type(),
               has_shape(z, {plan.rows(), plan.max_rank}), "[rows=", plan.rows(),
               ", max_rank=", plan.max_rank, "]");
}

void check_weight(const Plan& plan, const Tensor& weight, const Tensor& like) {
  check_shape(plan.op, "weight", weight, weight.dim() == 2, "[sum of ranks, features]");
  check_same_dtype(plan.op, "weight", weight, "the tokens", like);
  check_same_device(plan.op, like, weight);
}

// The multiplications of all slots' products, for each of `count`.
int64_t cost_of(const Plan& plan, int64_t features, int64_t count) {
  return plan.rows() * plan.max_rank / std::max<int64_t>(1, count) * features;
}

Tensor lora_shrink(const Tensor& x, const Tensor& weight, const Tensor& order,
                   const Tensor& inverse, const Tensor& offsets, const Tensor& ranks,
                   int64_t max_rank) {
  Plan plan{"_lora_shrink", order, inverse, offsets, ranks, max_rank};
  check_tokens(plan, "x", x);
  check_weight(plan, weight, x);
  const int64_t features = x.size(1);
  check_shape(plan.op, "weight", weight, weight.size(1) == features,
              "[sum of ranks, features=", features, "]");
  plan.prepare(x, weight.size(0));
  check_token_number(plan, x);
  const Tensor a = as_contiguous(x), w = as_contiguous(weight);
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
  check_shape("_lora_expand", "z", z, z.dim() == 2, "[rows, max_rank]");
  check_floating("_lora_expand", "z", z);
  Plan plan{"_lora_expand", order, inverse, offsets, ranks, z.size(1)};
  check_weight(plan, weight, z);
  plan.prepare(z, weight.size(0));
  check_z(plan, z, z);
  const int64_t features = weight.size(1);
  const Tensor a = as_contiguous(z), w = as_contiguous(weight);
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
  check_shape("_lora_outer", "z", z, z.dim() == 2, "[rows, max_rank]");
  Plan plan{"_lora_outer", order, inverse, offsets, ranks, z.size(1)};
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
