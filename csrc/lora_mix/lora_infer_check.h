// What `_lora_infer` works on: which experts the slots select, and the rows of these.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <optional>
#include <vector>

#include "lora_mix/lora_mix_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {

using Tensors = std::vector<Tensor>;
using Scaling = std::optional<std::vector<double>>;

struct LoraInputs {
  const char* op;
  Tensor x, weights;
  Tensors a, b;
  OptionalTensor indices;  // none: a weight is that of an expert, selected where it is not 0
  Scaling scaling;

  std::int64_t experts() const { return static_cast<std::int64_t>(a.size()); }
  std::int64_t tokens() const {
    const auto sizes = x.sizes();
    return std::accumulate(sizes.begin(), sizes.end() - 1, std::int64_t{1}, std::multiplies());
  }
  std::int64_t slots() const { return weights.size(weights.dim() - 1); }
  std::int64_t in_features() const { return x.size(x.dim() - 1); }
  std::int64_t features() const { return b[0].size(0); }

  void check_all() const {
    check_shape(op, "x", x, x.dim() > 0, "[..., in_features]");
    check_floating(op, "x", x);
    check(experts() > 0 && b.size() == a.size(), op,
          ": expected factors of at least one expert, as many factors_b as factors_a, got ",
          b.size(), " and ", a.size());
    for (std::int64_t e = 0; e < experts(); ++e) {
      const bool fits = a[e].dim() == 2 && b[e].dim() == 2 && a[e].size(1) == in_features() &&
                        b[e].size(1) == a[e].size(0) && b[e].size(0) == b[0].size(0);
      check(fits, op, ": expected factors of shapes [rank, ", in_features(),
            "] and [out_features, rank] for expert ", e, ", got ", shape(a[e]), " and ",
            shape(b[e]));
      for (const Tensor* factor : {&a[e], &b[e]}) {
        check_floating(op, "factors", *factor);
        if (!factor->is_cpu()) check_same_device(op, x, *factor);  // asked for 2 E tensors: fast
      }
    }
    const bool wide = x.scalar_type() == ScalarType::Double;
    check_dtype(op, "weights", weights, wide ? ScalarType::Double : ScalarType::Float);
    const auto same = [](const Tensor& one, const Tensor& other, std::int64_t behind) {
      return one.dim() == other.dim() &&
             std::equal(one.sizes().begin(), one.sizes().end() - behind, other.sizes().begin());
    };
    check_shape(op, "weights", weights, same(x, weights, 1) && (indices || slots() == experts()),
                "[..., slots] with the tokens of x, and without indices a slot for each expert");
    if (indices)
      check_tensor(op, "indices", *indices, x, ScalarType::Long, same(weights, *indices, 0),
                   "[..., slots], that of weights");
    check(!scaling || scaling->size() == a.size(), op, ": expected scaling of ", experts(),
          " numbers, got ", scaling ? scaling->size() : 0);
  }

  // Of contiguous weights and indices: the expert of each slot; -1 where there is none.
  std::vector<std::int64_t> experts_of_slots() const {
    std::vector<std::int64_t> result(weights.numel());
    if (indices) {
      std::copy_n(data<std::int64_t>(*indices), result.size(), result.begin());
      for (const std::int64_t e : result)
        check(-1 <= e && e < experts(), op, ": expected indices in [-1, num_experts=", experts(),
              "), got ", e);
      return result;
    }
    dispatch_float_double(op, "weights", weights, [&]<class C>() {
      for (std::size_t slot = 0; slot < result.size(); ++slot)
        result[slot] =
            data<C>(weights)[slot] != 0 ? static_cast<std::int64_t>(slot) % experts() : -1;
    });
    return result;
  }

  // Where the numbers of factors are, in the dtype of x, for experts with rows. What had to be
  // converted is kept among the factors.
  template <class T>
  std::vector<const T*> places(Tensors& factors, const std::vector<std::int64_t>& offsets) const {
    std::vector<const T*> result(factors.size());
    for (std::size_t e = 0; e < factors.size(); ++e) {
      if (offsets[e] == offsets[e + 1]) continue;
      if (factors[e].scalar_type() != x.scalar_type())
        factors[e] = torch::stable::to(factors[e], x.scalar_type());
      factors[e] = as_contiguous(factors[e]);
      result[e] = data<T>(factors[e]);
    }
    return result;
  }
};

// The selected slots of some tokens, by expert.
struct LoraSelection {
  std::vector<std::int64_t> offsets, ranks, token_of, slot_of;
  std::int64_t max_rank = 0;

  LoraSelection(const std::int64_t* expert_of, std::int64_t tokens, std::int64_t slots,
                const Tensors& a)
      : offsets(a.size() + 1), ranks(a.size()) {
    const std::int64_t* end = expert_of + tokens * slots;
    for (const std::int64_t* e = expert_of; e < end; ++e)
      if (*e >= 0) ++offsets[*e + 1];
    for (std::size_t e = 0; e < a.size(); ++e) {
      ranks[e] = a[e].size(0);
      if (offsets[e + 1] > 0) max_rank = std::max(max_rank, ranks[e]);
      offsets[e + 1] += offsets[e];
    }
    token_of.resize(rows()), slot_of.resize(rows());
    std::vector<std::int64_t> next = offsets;
    for (std::int64_t slot = 0; slot < tokens * slots; ++slot)
      if (expert_of[slot] >= 0) {
        const std::int64_t r = next[expert_of[slot]]++;
        token_of[r] = slot / slots, slot_of[r] = slot;
      }
  }
  std::int64_t rows() const { return offsets.back(); }
};

}  // namespace torch_routers
