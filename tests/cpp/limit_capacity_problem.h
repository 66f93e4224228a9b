// Plans for the tests of limit_capacity, and its four steps in a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/scalar.h"
#include "host_array.h"
#include "limit_capacity/limit_capacity_kernel.h"

namespace torch_routers {

template <class T> struct CapacityProblem {
  CapacityShape shape;
  DropPolicy policy;
  std::vector<std::int64_t> order, inverse, offsets, capacity;
  std::vector<T> scores;
  std::vector<std::int64_t> row_ids, group_offsets;  // may be empty
  std::int64_t seed = 12345, dropped = 7;
};

struct CapacityResults {
  std::vector<std::int64_t> order, inverse, counts, offsets, dropped;
  bool operator==(const CapacityResults&) const = default;
};

// Half of the slots choose expert 0, some none. `scores` may be "ties" or "special" (infinite, NaN).
template <class T>
CapacityProblem<T> capacity_problem(CapacityShape shape, DropPolicy policy, std::int64_t capacity,
                                    const std::string& scores = "normal", unsigned seed = 0) {
  std::mt19937 random(seed);
  CapacityProblem<T> p{shape, policy, {}, {}, {0}, {}, {}, {}, {}};
  std::vector<std::int64_t> experts(shape.all_slots());
  for (std::int64_t& expert : experts) {
    const auto any = static_cast<std::int64_t>(random() % shape.experts);
    expert = random() % 8 == 0 ? -1 : random() % 2 ? 0 : any;
  }
  p.inverse.assign(shape.all_slots(), -1);
  for (std::int64_t e = 0; e < shape.experts; ++e) {
    for (std::int64_t slot = 0; slot < shape.all_slots(); ++slot)
      if (experts[slot] == e) {
        p.inverse[slot] = static_cast<std::int64_t>(p.order.size());
        p.order.push_back(slot);
      }
    p.offsets.push_back(static_cast<std::int64_t>(p.order.size()));
  }
  p.order.resize(shape.rows, -1);
  for (std::int64_t g = 0; g < shape.groups; ++g)
    p.capacity.push_back(g % 3 == 2 ? capacity / 2 : capacity);
  for (std::int64_t g = 0; shape.groups > 1 && g <= shape.groups; ++g)  // some are empty
    p.group_offsets.push_back(g == shape.groups ? shape.tokens
                                                : shape.tokens * (g / 2) / shape.groups);
  const std::int64_t size = policy == DropPolicy::Weight     ? shape.all_slots()
                            : policy == DropPolicy::Priority ? shape.tokens
                                                             : 0;
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInfinity = HUGE_VAL;
  const double special[] = {kNan, -kNan, kInfinity, -kInfinity, 0, -0.0};
  for (std::int64_t i = 0; i < size; ++i) {
    double x = std::normal_distribution<double>()(random);
    if (scores == "ties") x = std::round(x);
    if (scores == "special" && random() % 2) x = special[random() % 6];
    T value;
    store(&value, static_cast<Compute<T>>(x));
    p.scores.push_back(value);
  }
  for (std::int64_t t = 0; policy == DropPolicy::Random && seed % 2 && t < shape.tokens; ++t)
    p.row_ids.push_back((t * 7919) << 20);
  return p;
}

// `Array` holds memory where `run(params, count)` runs a step.
template <template <class> class Array, class T, class Run>
CapacityResults limit_capacity_steps(const CapacityProblem<T>& p, const Run& run) {
  const CapacityShape& s = p.shape;
  const auto some = [](const auto& array, bool present) {
    return present ? array.data() : nullptr;
  };
  const Array<std::int64_t> order(p.order), inverse(p.inverse), offsets(p.offsets),
      capacity(p.capacity), row_ids(p.row_ids), group_offsets(p.group_offsets),
      seed(std::vector<std::int64_t>{p.seed}), dropped(std::vector<std::int64_t>{p.dropped});
  const Array<T> scores(p.scores);
  const Array<std::uint64_t> keys(s.rows);
  const Array<Segment> segments(s.num_segments());
  const Array<std::int64_t> new_order(s.rows), new_inverse(s.all_slots()), new_counts(s.experts),
      new_offsets(s.experts + 1), new_dropped(1), new_rows(s.rows);
  run(CapacitySelect<T>{s, order.data(), offsets.data(), capacity.data(),
                        some(scores, !p.scores.empty()), seed.data(),
                        some(row_ids, !p.row_ids.empty()),
                        some(group_offsets, !p.group_offsets.empty()), p.policy, keys.data(),
                        segments.data()},
      s.num_segments());
  run(CapacityPlace{s, dropped.data(), segments.data(), new_counts.data(), new_offsets.data(),
                    new_dropped.data()},
      1);
  run(CapacityMove{s, order.data(), keys.data(), segments.data(), new_order.data(),
                   new_rows.data()},
      s.num_segments());
  run(CapacityRenumber{s, inverse.data(), new_rows.data(), segments.data(), new_inverse.data(),
                       new_order.data()},
      s.rows_or_slots());
  return {new_order.to_host(), new_inverse.to_host(), new_counts.to_host(), new_offsets.to_host(),
          new_dropped.to_host()};
}

}  // namespace torch_routers
