#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "limit_capacity/limit_capacity_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {
namespace {

using std::int64_t;
using OptionalTensor = std::optional<Tensor>;
constexpr auto op = "limit_capacity";

DropPolicy policy_of(const std::string& name) {
  if (name == "position") return DropPolicy::Position;
  if (name == "weight") return DropPolicy::Weight;
  if (name == "priority") return DropPolicy::Priority;
  check(name == "random", op, ": expected policy in position, weight, priority or random, got ",
        name);
  return DropPolicy::Random;
}

std::string named(const char* name, int64_t size) { return name + ('=' + std::to_string(size)); }

// Tensors of a call, by what is known without their data. `order` stands for the plan's device.
struct Check {
  const Tensor& order;

  void integers(const char* name, const Tensor& tensor, bool fits, const std::string& shape) const {
    check(tensor.scalar_type() == ScalarType::Long, op, ": expected ", name, " in int64, got ",
          dtype(tensor));
    sizes(name, tensor, fits, shape);
  }
  void floats(const char* name, const Tensor& tensor, bool fits, const std::string& shape) const {
    dispatch_floating(op, name, tensor, []<class T>() {});
    sizes(name, tensor, fits, shape);
  }

 private:
  void sizes(const char* name, const Tensor& tensor, bool fits, const std::string& shape) const {
    check(fits, op, ": expected ", name, " of shape [", shape, "], got ",
          torch_routers::shape(tensor));
    check_same_device(op, order, tensor);
  }
};

CapacityShape check_shape(const Tensor& order, const Tensor& inverse, const Tensor& offsets,
                          const Tensor& dropped, const Tensor& capacity,
                          const OptionalTensor& group_offsets) {
  const Check tensors{order};
  const auto are_ends = [](const Tensor& ends) { return ends.dim() == 1 && ends.size(0) >= 2; };
  tensors.integers("plan.order", order, order.dim() == 1, "max_rows");
  tensors.integers("plan.inverse", inverse, inverse.dim() == 2, "tokens, slots");
  tensors.integers("plan.offsets", offsets, are_ends(offsets), "num_experts + 1");
  tensors.integers("plan.dropped", dropped, dropped.dim() == 0, "");
  if (group_offsets)
    tensors.integers("group_offsets", *group_offsets, are_ends(*group_offsets), "groups + 1");
  const int64_t groups = group_offsets ? group_offsets->size(0) - 1 : 1;
  tensors.integers("capacity", capacity, has_shape(capacity, {groups}), named("groups", groups));
  return {order.size(0), inverse.size(0), inverse.size(1), offsets.size(0) - 1, groups};
}

void check_policy(const CapacityShape& s, DropPolicy policy, const OptionalTensor& scores,
                  const OptionalTensor& seed, const OptionalTensor& row_ids, const Tensor& order) {
  const Check tensors{order};
  const bool by_weight = policy == DropPolicy::Weight, by_priority = policy == DropPolicy::Priority;
  check(scores.has_value() == (by_weight || by_priority), op,
        ": expected scores with the policies weight and priority, got ", scores ? "some" : "none");
  check(seed.has_value() == (policy == DropPolicy::Random), op,
        ": expected a seed with the policy random, got ", seed ? "one" : "none");
  const std::string per_token = named("tokens", s.tokens);
  if (by_weight)
    tensors.floats("weights", *scores, has_shape(*scores, {s.tokens, s.slots}),
                   per_token + ", " + named("slots", s.slots));
  if (by_priority) tensors.floats("priority", *scores, has_shape(*scores, {s.tokens}), per_token);
  if (seed) tensors.integers("seed", *seed, seed->dim() == 0, "");
  if (row_ids) tensors.integers("row_ids", *row_ids, has_shape(*row_ids, {s.tokens}), per_token);
}

// ---- what is in a tensor, on the CPU only: elsewhere it would cost a synchronisation ------------

void check_offsets(const char* name, const Tensor& tensor, int64_t last, const char* of,
                   bool at_most) {
  const int64_t *values = data<int64_t>(tensor), groups = tensor.size(0) - 1;
  check(values[0] == 0 && (at_most ? values[groups] <= last : values[groups] == last), op,
        ": expected ", name, " from 0 to ", at_most ? "at most " : "", of, ", ", last, ", got ",
        values[0], " to ", values[groups]);
  for (int64_t g = 0; g < groups; ++g)
    check(values[g] <= values[g + 1], op, ": expected ", name, " in ascending order, got ",
          values[g + 1], " after ", values[g]);
}

// The next two look at the signs of differences together: loops that become vectors, since on the
// CPU a plan that loses no row costs little more than these checks.
bool ascend_in(int64_t past, const int64_t* values, int64_t count) {
  const auto at = [&](int64_t i) { return static_cast<uint64_t>(values[i]); };
  if (count == 0) return true;
  uint64_t signs = at(0) | (past - 1 - at(count - 1));
  for (int64_t i = 1; i < count; ++i) signs |= at(i) | (at(i) - at(i - 1) - 1);
  return signs >> 63 == 0;
}
bool all_from_minus_one_in(int64_t past, const int64_t* values, int64_t count) {
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<uint64_t>(values[i]);
    signs |= (value + 1) | (past - 1 - value);
  }
  return signs >> 63 == 0;
}

void check_rows(const CapacityShape& s, const Tensor& order, const Tensor& inverse,
                const Tensor& offsets) {
  const int64_t *slots = data<int64_t>(order), *ends = data<int64_t>(offsets);
  for (int64_t e = 0; e < s.experts; ++e) {
    if (ascend_in(s.all_slots(), slots + ends[e], ends[e + 1] - ends[e])) continue;
    for (int64_t row = ends[e], last = -1; row < ends[e + 1]; last = slots[row++])
      check(last < slots[row] && slots[row] < s.all_slots(), op,
            ": expected plan.order in [0, tokens * slots=", s.all_slots(),
            "), ascending within each expert, got ", slots[row]);
  }
  const int64_t* rows = data<int64_t>(inverse);
  if (all_from_minus_one_in(s.rows, rows, s.all_slots())) return;
  for (int64_t slot = 0; slot < s.all_slots(); ++slot)
    check(-1 <= rows[slot] && rows[slot] < s.rows, op,
          ": expected plan.inverse in [-1, max_rows=", s.rows, "), got ", rows[slot]);
}

// order, inverse, counts, offsets and dropped of the new plan.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> limit_capacity(
    const Tensor& order, const Tensor& inverse, const Tensor& offsets, const Tensor& dropped,
    const Tensor& capacity, const std::string& policy_name, const OptionalTensor& scores,
    const OptionalTensor& seed, const OptionalTensor& row_ids,
    const OptionalTensor& group_offsets) {
  const DropPolicy policy = policy_of(policy_name);
  const CapacityShape s = check_shape(order, inverse, offsets, dropped, capacity, group_offsets);
  check_policy(s, policy, scores, seed, row_ids, order);
  const Tensor o = as_contiguous(order), i = as_contiguous(inverse), ends = as_contiguous(offsets),
               c = as_contiguous(capacity);
  const OptionalTensor x = contiguous(scores), ids = contiguous(row_ids),
                       groups = contiguous(group_offsets);
  if (o.is_cpu()) {
    check_offsets("plan.offsets", ends, s.rows, "the number of rows", true);
    check_rows(s, o, i, ends);
    if (groups) check_offsets("group_offsets", *groups, s.tokens, "the number of tokens", false);
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
