#include <type_traits>

#include "expert_plan/expert_plan_kernel.h"
#include "expert_plan/expert_plan_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t, std::uint64_t;
using PlanOfIndices = ExpertPlan<int64_t>;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Range {
  int64_t begin, end;
};

// Part `part` of `parts` of [0, size).
Range range_of(int64_t part, int64_t parts, int64_t size) {
  const int64_t length = size / parts, longer = size % parts, begin = part * length;
  return {begin + smaller(part, longer), begin + length + smaller(part + 1, longer)};
}

// Of a part, by index + 1: slots without expert, of each expert, and with an index out of range;
// after place_experts the row of the next such slot.
int64_t* bins_of(const ExpertPlanRows& p, int64_t part) { return p.bins + part * p.num_bins(); }

// ---- given by index ----------------------------------------------------------------------------

void count(const PlanOfIndices& p, int64_t part) {
  const Range slots = range_of(part, p.parts, p.size());
  const int64_t* indices = p.experts_of;
  const auto last = static_cast<uint64_t>(p.experts) + 1;
  int64_t* counts = bins_of(p, part);
  for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
    const uint64_t bin = static_cast<uint64_t>(indices[slot]) + 1;
    ++counts[bin < last ? bin : last];
  }
}

void place(const PlanOfIndices& p, int64_t part) {
  const Range slots = range_of(part, p.parts, p.size());
  const int64_t *indices = p.experts_of, max_rows = p.max_rows;
  int64_t *next = bins_of(p, part) + 1, *order = p.order, *inverse = p.inverse;
  if (p.offsets[p.experts] == p.size()) {  // the usual case: each slot has a row
    for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
      const int64_t row = next[indices[slot]]++;
      order[row] = slot;
      inverse[slot] = row;
    }
    return;
  }
  // A slot without expert goes to the tail, where it says -1: no branch that cannot be foreseen.
  for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
    const int64_t row = next[indices[slot]]++, none = indices[slot] >> 63;  // -1 or 0
    const bool exists = row < max_rows;
    if (exists) order[row] = slot | none;
    inverse[slot] = exists ? row | none : -1;
  }
}

// ---- given by weight ---------------------------------------------------------------------------

template <class T> void count(const ExpertPlan<T>& p, int64_t part) {
  const Range tokens = range_of(part, p.parts, p.tokens);
  const int64_t experts = p.experts;
  int64_t* counts = bins_of(p, part) + 1;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const T* weights = p.experts_of + t * experts;
    for (int64_t e = 0; e < experts; ++e) counts[e] += is_live(weights[e]);
  }
}

template <class T> void place(const ExpertPlan<T>& p, int64_t part) {
  const Range tokens = range_of(part, p.parts, p.tokens);
  const int64_t experts = p.experts, max_rows = p.max_rows;
  int64_t *next = bins_of(p, part) + 1, *order = p.order;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const int64_t first = t * experts;
    const T* weights = p.experts_of + first;
    int64_t* inverse = p.inverse + first;
    for (int64_t e = 0; e < experts; ++e) inverse[e] = -1;
    for (int64_t e = 0; e < experts; e += 64) {
      const int64_t width = smaller(64, experts - e);
      uint64_t live = 0;  // a bit per expert
      for (int64_t i = 0; i < width; ++i) live |= uint64_t{is_live(weights[e + i])} << i;
      for (; live != 0; live &= live - 1) {
        const int64_t expert = e + __builtin_ctzll(live), row = next[expert]++;
        if (row >= max_rows) continue;
        order[row] = first + expert;
        inverse[expert] = row;
      }
    }
  }
}

// Where the rows begin that `place` does not write.
template <class T> int64_t tail(const ExpertPlan<T>& p) {
  const bool by_index = std::is_same_v<T, int64_t>;
  return by_index ? smaller(p.size(), p.max_rows) : p.offsets[p.experts];
}

}  // namespace

template <class T> void count_slots(const ExpertPlan<T>& p, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    int64_t* counts = bins_of(p, part);
    for (int64_t i = 0, size = p.num_bins(); i < size; ++i) counts[i] = 0;
    count(p, part);
  }
}

void place_experts(const ExpertPlanRows& p) {
  const int64_t experts = p.experts, max_rows = p.max_rows;
  int64_t *next = p.counts, *offsets = p.offsets;
  for (int64_t e = 0; e < experts; ++e) next[e] = 0;
  for (int64_t part = 0; part < p.parts; ++part) {
    const int64_t* counts = bins_of(p, part) + 1;
    for (int64_t e = 0; e < experts; ++e) next[e] += counts[e];
  }
  int64_t row = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t count = next[e];
    next[e] = row;
    offsets[e] = smaller(row, max_rows);
    row += count;
  }
  offsets[experts] = smaller(row, max_rows);
  *p.dropped = row - offsets[experts];

  for (int64_t part = 0; part < p.parts; ++part) {
    int64_t* bins = bins_of(p, part);
    const int64_t without_expert = bins[0];
    bins[0] = row;
    row += without_expert;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t first = next[e];
      next[e] += bins[e + 1];
      bins[e + 1] = first;
    }
  }
  for (int64_t e = 0; e < experts; ++e) p.counts[e] = offsets[e + 1] - offsets[e];
}

template <class T> void place_slots(const ExpertPlan<T>& p, int64_t begin, int64_t end) {
  int64_t *order = p.order, first = tail(p);
  for (int64_t part = begin; part < end; ++part) {
    place(p, part);
    const Range rest = range_of(part, p.parts, p.max_rows - first);
    for (int64_t i = rest.begin; i < rest.end; ++i) order[first + i] = -1;
  }
}

#define TORCH_ROUTERS_INSTANTIATE(T)                                 \
  template void count_slots(const ExpertPlan<T>&, int64_t, int64_t); \
  template void place_slots(const ExpertPlan<T>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(int64_t)
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
