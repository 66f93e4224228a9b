#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "expert_plan/expert_plan_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {
namespace {

using std::int64_t;

// order, inverse, counts, offsets, dropped
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kSlotsPerPart = 32768;

// The first index that is no expert's and not -1, as an error.
void check_indices(const char* op, const ExpertPlan<int64_t>& plan) {
  int64_t wrong = 0;
  for (int64_t part = 0; part < plan.parts; ++part) wrong += plan.out_of_range(part);
  for (int64_t slot = 0; wrong != 0 && slot < plan.size(); ++slot) {
    const int64_t index = plan.experts_of[slot];
    check(-1 <= index && index < plan.experts, op,
          ": expected indices in [-1, num_experts=", plan.experts, "), got ", index);
  }
}

// Of contiguous indices or weights [tokens, slots].
template <class T>
Results run(const char* op, const Tensor& experts_of, int64_t experts,
            std::optional<int64_t> rows) {
  const int64_t tokens = experts_of.size(0), slots = experts_of.size(1);
  const int64_t max_rows = rows.value_or(tokens * slots);
  check(max_rows >= 0, op, ": expected max_rows >= 0, got ", max_rows);

  const auto integers = [&](std::initializer_list<int64_t> sizes) {
    return allocate(experts_of, sizes, ScalarType::Long);
  };
  const Tensor order = integers({max_rows}), inverse = integers({tokens, slots});
  const Tensor counts = integers({experts}), offsets = integers({experts + 1});
  const Tensor dropped = integers({});
  ExpertPlan<T> plan{tokens,
                     slots,
                     experts,
                     max_rows,
                     1,
                     nullptr,
                     mutable_data<int64_t>(order),
                     mutable_data<int64_t>(inverse),
                     mutable_data<int64_t>(counts),
                     mutable_data<int64_t>(offsets),
                     mutable_data<int64_t>(dropped),
                     data<T>(experts_of)};
  plan.parts = experts_of.is_cpu() ? std::clamp<int64_t>(plan.size() / kSlotsPerPart, 1,
                                                         torch::stable::get_num_threads())
                                   : plan.cuda_parts();
  const Tensor bins = integers({plan.parts * plan.num_bins()});
  plan.bins = mutable_data<int64_t>(bins);

  const int64_t cost = plan.size() / plan.parts;
  launch(
      experts_of, plan.parts, cost,
      [&](int64_t begin, int64_t end) {
        TORCH_ROUTERS_PICK_ISA(isa(), count_slots(plan, begin, end));
      },
      [&](void* stream) { expert_plan_cuda(plan, stream); });
  if (!experts_of.is_cpu()) return {order, inverse, counts, offsets, dropped};
  if constexpr (std::is_same_v<T, int64_t>) check_indices(op, plan);
  TORCH_ROUTERS_PICK_ISA(isa(), place_experts(plan));
  launch(
      experts_of, plan.parts, cost,
      [&](int64_t begin, int64_t end) {
        TORCH_ROUTERS_PICK_ISA(isa(), place_slots(plan, begin, end));
      },
      [](void*) {});
  return {order, inverse, counts, offsets, dropped};
}

Results expert_plan(const Tensor& indices, int64_t num_experts, std::optional<int64_t> max_rows) {
  constexpr auto op = "expert_plan";
  check_shape(op, "indices", indices, indices.dim() == 2, "[tokens, slots]");
  check_dtype(op, "indices", indices, ScalarType::Long);
  check(num_experts >= 1, op, ": expected num_experts >= 1, got ", num_experts);
  return run<int64_t>(op, as_contiguous(indices), num_experts, max_rows);
}

Results expert_plan_from_weights(const Tensor& weights, std::optional<int64_t> max_rows) {
  constexpr auto op = "expert_plan_from_weights";
  check_shape(op, "weights", weights, weights.dim() == 2 && weights.size(1) >= 1,
              "[tokens, num_experts] with num_experts >= 1");
  std::optional<Results> results;
  dispatch_floating(op, "weights", weights, [&]<class T>() {
    results = run<T>(op, as_contiguous(weights), weights.size(1), max_rows);
  });
  return *results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("expert_plan(Tensor indices, SymInt num_experts, SymInt? max_rows) -> (Tensor order, "
        "Tensor inverse, Tensor counts, Tensor offsets, Tensor dropped)");
  m.def("expert_plan_from_weights(Tensor weights, SymInt? max_rows) -> (Tensor order, "
        "Tensor inverse, Tensor counts, Tensor offsets, Tensor dropped)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("expert_plan", TORCH_BOX(&expert_plan));
  m.impl("expert_plan_from_weights", TORCH_BOX(&expert_plan_from_weights));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("expert_plan", TORCH_BOX(&expert_plan));
  m.impl("expert_plan_from_weights", TORCH_BOX(&expert_plan_from_weights));
}
#endif

}  // namespace torch_routers
