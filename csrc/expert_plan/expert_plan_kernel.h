// The plan of a dispatch: the live slots of a routing, sorted by expert and, within an expert, by
// their number, by counting. A slot is numbered token * slots + slot.
//
//   expert(slot)   given by index: its index; -1 is no expert, and the slot has no row
//                  given by weight: its place in the token's row, where the weight is not 0 (a NaN
//                  is not 0); slots = experts
//   order[r]       the slot of row r; -1 behind the last row
//   inverse[slot]  the row of a slot; -1 where it has none
//   offsets[e]     the first row of expert e; counts[e] = offsets[e + 1] - offsets[e]
//   dropped        slots of an expert for which there was no row
//
// There are at most max_rows rows. Where they do not suffice, the last slots of the order get none;
// offsets and counts are those of the rows there are.
//
// The slots come in parts: count each part, find from the counts where the slots of each part and
// expert go, put them there. These are integers: the result does not depend on the parts.
//
// Callers on the CPU look for indices out of range between the first step and the second; for CUDA
// that would cost a synchronisation, and there such an index is that of no expert.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace torch_routers {

struct ExpertPlanRows {
  std::int64_t tokens, slots, experts, max_rows;
  std::int64_t parts;     // at least 1; on CUDA those of cuda_parts()
  std::int64_t* bins;     // scratch: [parts, num_bins()], on CUDA [experts, parts]
  std::int64_t* order;    // [max_rows]
  std::int64_t* inverse;  // [tokens, slots]
  std::int64_t* counts;   // [experts]
  std::int64_t* offsets;  // [experts + 1]
  std::int64_t* dropped;  // [1]

  constexpr std::int64_t size() const { return tokens * slots; }
  constexpr std::int64_t num_bins() const { return experts + 2; }
  // After count_slots: slots of a part whose index is out of range.
  std::int64_t out_of_range(std::int64_t part) const {
    return bins[part * num_bins() + experts + 1];
  }

  // On CUDA a warp has a part; parts are long enough that there are fewer counts than slots.
  constexpr std::int64_t cuda_part_size() const {
    const std::int64_t long_enough = 2 * experts > 256 ? 2 * experts : 256;
    const std::int64_t few_enough = size() / kMostCudaParts + 1;
    return ((long_enough > few_enough ? long_enough : few_enough) + 31) / 32 * 32;
  }
  constexpr std::int64_t cuda_parts() const {
    return size() == 0 ? 1 : (size() - 1) / cuda_part_size() + 1;
  }
  static constexpr std::int64_t kMostCudaParts = 8192;
};

// T: std::int64_t for indices, else the scalar type of the weights.
template <class T> struct ExpertPlan : ExpertPlanRows {
  const T* experts_of;  // [tokens, slots]: indices or weights
};

// On the calling thread. The three steps: parts [begin, end), the experts, parts [begin, end).
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T> void count_slots(const ExpertPlan<T>&, std::int64_t begin, std::int64_t end);
  void place_experts(const ExpertPlanRows&);
  template <class T> void place_slots(const ExpertPlan<T>&, std::int64_t begin, std::int64_t end);
)

// All of it, queued on `stream` (a cudaStream_t) of the current device.
template <class T> void expert_plan_cuda(const ExpertPlan<T>&, void* stream);

}  // namespace torch_routers
