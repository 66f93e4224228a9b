// What limit_capacity asks of its arguments.
#pragma once

#include <string>

#include "limit_capacity/limit_capacity_kernel.h"
#include "op/check.h"
#include "op/dispatch.h"

namespace torch_routers {

inline DropPolicy policy_of(const char* op, const std::string& name) {
  if (name == "position") return DropPolicy::Position;
  if (name == "weight") return DropPolicy::Weight;
  if (name == "priority") return DropPolicy::Priority;
  check(name == "random", op, ": expected policy in position, weight, priority or random, got ",
        name);
  return DropPolicy::Random;
}

inline CapacityShape capacity_shape(const char* op, const Tensor& order, const Tensor& inverse,
                                    const Tensor& offsets, const Tensor& dropped,
                                    const Tensor& capacity, const OptionalTensor& group_offsets) {
  const auto check_integers = [&](const char* name, const Tensor& tensor, bool fits,
                                  const auto&... words) {
    check_tensor(op, name, tensor, order, ScalarType::Long, fits, words...);
  };
  check_integers("plan.order", order, order.dim() == 1, "[max_rows]");
  check_integers("plan.inverse", inverse, inverse.dim() == 2, "[tokens, slots]");
  check_integers("plan.offsets", offsets, is_offsets(offsets), "[num_experts + 1]");
  check_integers("plan.dropped", dropped, dropped.dim() == 0, "[]");
  if (group_offsets)
    check_integers("group_offsets", *group_offsets, is_offsets(*group_offsets), "[groups + 1]");
  const std::int64_t groups = group_offsets ? group_offsets->size(0) - 1 : 1;
  check_integers("capacity", capacity, has_shape(capacity, {groups}), "[groups=", groups, "]");
  return {order.size(0), inverse.size(0), inverse.size(1), offsets.size(0) - 1, groups};
}

inline void check_policy(const char* op, const CapacityShape& s, DropPolicy policy,
                         const OptionalTensor& scores, const OptionalTensor& seed,
                         const OptionalTensor& row_ids, const Tensor& order) {
  const bool by_weight = policy == DropPolicy::Weight, by_priority = policy == DropPolicy::Priority;
  check(scores.has_value() == (by_weight || by_priority), op,
        ": expected scores with the policies weight and priority, got ", scores ? "some" : "none");
  check(seed.has_value() == (policy == DropPolicy::Random), op,
        ": expected a seed with the policy random, got ", seed ? "one" : "none");
  if (scores) {
    const char* name = by_weight ? "weights" : "priority";
    check_floating(op, name, *scores);
    if (by_weight)
      check_shape(op, name, *scores, has_shape(*scores, {s.tokens, s.slots}), "[tokens=", s.tokens,
                  ", slots=", s.slots, "]");
    else
      check_shape(op, name, *scores, has_shape(*scores, {s.tokens}), "[tokens=", s.tokens, "]");
    check_same_device(op, order, *scores);
  }
  if (seed) check_tensor(op, "seed", *seed, order, ScalarType::Long, seed->dim() == 0, "[]");
  if (row_ids)
    check_tensor(op, "row_ids", *row_ids, order, ScalarType::Long, has_shape(*row_ids, {s.tokens}),
                 "[tokens=", s.tokens, "]");
}

// ---- what is in a tensor, on the CPU only: elsewhere it would cost a synchronisation ------------

// The next two look at the signs of differences together: loops that become vectors, since on the
// CPU a plan that loses no row costs little more than these checks.
inline bool ascend_in(std::int64_t past, const std::int64_t* values, std::int64_t count) {
  const auto at = [&](std::int64_t i) { return static_cast<std::uint64_t>(values[i]); };
  if (count == 0) return true;
  std::uint64_t signs = at(0) | (past - 1 - at(count - 1));
  for (std::int64_t i = 1; i < count; ++i) signs |= at(i) | (at(i) - at(i - 1) - 1);
  return signs >> 63 == 0;
}
inline bool all_from_minus_one_in(std::int64_t past, const std::int64_t* values,
                                  std::int64_t count) {
  std::uint64_t signs = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<std::uint64_t>(values[i]);
    signs |= (value + 1) | (past - 1 - value);
  }
  return signs >> 63 == 0;
}

inline void check_rows(const char* op, const CapacityShape& s, const Tensor& order,
                       const Tensor& inverse, const Tensor& offsets) {
  const std::int64_t *slots = data<std::int64_t>(order), *ends = data<std::int64_t>(offsets);
  for (std::int64_t e = 0; e < s.experts; ++e) {
    if (ascend_in(s.all_slots(), slots + ends[e], ends[e + 1] - ends[e])) continue;
    for (std::int64_t row = ends[e], last = -1; row < ends[e + 1]; last = slots[row++])
      check(last < slots[row] && slots[row] < s.all_slots(), op,
            ": expected plan.order in [0, tokens * slots=", s.all_slots(),
            "), ascending within each expert, got ", slots[row]);
  }
  const std::int64_t* rows = data<std::int64_t>(inverse);
  if (all_from_minus_one_in(s.rows, rows, s.all_slots())) return;
  for (std::int64_t slot = 0; slot < s.all_slots(); ++slot)
    check(-1 <= rows[slot] && rows[slot] < s.rows, op,
          ": expected plan.inverse in [-1, max_rows=", s.rows, "), got ", rows[slot]);
}

}  // namespace torch_routers
