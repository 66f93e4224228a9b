#include <torch/csrc/stable/library.h>

#include <tuple>

#include "limit_capacity/limit_capacity_check.h"
#include "op/text.h"

namespace torch_routers {
namespace {

using std::int64_t;

// order, inverse, counts, offsets and dropped of the new plan.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> limit_capacity(
    const Tensor& order, const Tensor& inverse, const Tensor& offsets, const Tensor& dropped,
    const Tensor& capacity, const Text& policy_name, const OptionalTensor& scores,
    const OptionalTensor& seed, const OptionalTensor& row_ids,
    const OptionalTensor& group_offsets) {
  constexpr auto op = "limit_capacity";
  const DropPolicy policy = policy_of(op, policy_name);
  const CapacityShape s =
      capacity_shape(op, order, inverse, offsets, dropped, capacity, group_offsets);
  check_policy(op, s, policy, scores, seed, row_ids, order);
  const Tensor o = as_contiguous(order), i = as_contiguous(inverse), ends = as_contiguous(offsets),
               c = as_contiguous(capacity);
  const OptionalTensor x = contiguous(scores), ids = contiguous(row_ids),
                       groups = contiguous(group_offsets);
  if (o.is_cpu()) {
    check_offset_values(op, "plan.offsets", ends, s.rows, true, "at most the number of rows, ",
                        s.rows);
    check_rows(op, s, o, i, ends);
    if (groups)
      check_offset_values(op, "group_offsets", *groups, s.tokens, false, "the number of tokens, ",
                          s.tokens);
    for (int64_t g = 0; g < s.groups; ++g)
      check(data<int64_t>(c)[g] >= 0, op, ": expected capacity >= 0, got ", data<int64_t>(c)[g]);
  }

  const Tensor new_order = allocate(o, {s.rows}), new_inverse = allocate(o, {s.tokens, s.slots});
  const Tensor new_counts = allocate(o, {s.experts}), new_offsets = allocate(o, {s.experts + 1});
  const Tensor new_dropped = allocate(o, {});
  const Tensor keys = allocate(o, {s.rows}), new_rows = allocate(o, {s.rows});
  const Tensor scratch =
      allocate(o, {s.num_segments(), static_cast<int64_t>(sizeof(Segment))}, ScalarType::Byte);
  auto* segments = mutable_data<Segment>(scratch);

  const auto run = [&](const auto& params, int64_t count, int64_t cost) {
    launch(
        o, count, cost, [&](int64_t begin, int64_t end) { limit_capacity_cpu(params, begin, end); },
        [&](void* stream) { limit_capacity_cuda(params, stream); });
  };
  const int64_t rows_per_segment = s.rows / s.num_segments() + 1;
  const auto select = [&]<class T>() {
    run(CapacitySelect<T>{s, data<int64_t>(o), data<int64_t>(ends), data<int64_t>(c), data<T>(x),
                          data<int64_t>(seed), data<int64_t>(ids), data<int64_t>(groups), policy,
                          mutable_data<std::uint64_t>(keys), segments},
        s.num_segments(), rows_per_segment);
  };
  if (x)
    dispatch_floating(op, "scores", *x, select);
  else
    select.operator()<float>();
  run(CapacityPlace{s, data<int64_t>(dropped), segments, mutable_data<int64_t>(new_counts),
                    mutable_data<int64_t>(new_offsets), mutable_data<int64_t>(new_dropped)},
      1, s.num_segments());
  run(CapacityMove{s, data<int64_t>(o), data<std::uint64_t>(keys), segments,
                   mutable_data<int64_t>(new_order), mutable_data<int64_t>(new_rows)},
      s.num_segments(), rows_per_segment);
  run(CapacityRenumber{s, data<int64_t>(i), data<int64_t>(new_rows), segments,
                       mutable_data<int64_t>(new_inverse), mutable_data<int64_t>(new_order)},
      s.rows_or_slots(), 1);
  return {new_order, new_inverse, new_counts, new_offsets, new_dropped};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("limit_capacity(Tensor order, Tensor inverse, Tensor offsets, Tensor dropped, "
        "Tensor capacity, str policy, Tensor? scores, Tensor? seed, Tensor? row_ids, "
        "Tensor? group_offsets) -> (Tensor new_order, Tensor new_inverse, Tensor new_counts, "
        "Tensor new_offsets, Tensor new_dropped)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) {
  m.impl("limit_capacity", TORCH_BOX(&limit_capacity));
}

#ifdef TORCH_ROUTERS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_routers, CUDA, m) {
  m.impl("limit_capacity", TORCH_BOX(&limit_capacity));
}
#endif

}  // namespace torch_routers
