// From a dispatch plan to the plan of those of its rows that fit into a capacity.
//
// A plan sorts slots, numbered token * slots + j, by expert: rows [offsets[e], offsets[e + 1]) hold
// those of expert e in ascending order. The rows of an expert whose tokens are in one group are a
// segment. Of a segment of group g the capacity[g] rows with the smallest keys are kept, of equal
// keys the first rows:
//
//   position   j
//   weight     ~rank_key(weight of the slot)
//   priority   ~rank_key(priority of the token)
//   random     two words of Philox for (seed, row id of the token, e)
//
// Kept rows move together, in their old order; the others lose their slots.
//
// In four kernels: CapacitySelect finds, per segment, the largest key that is kept; CapacityPlace
// where the rows of each segment go; CapacityMove moves them; CapacityRenumber tells the slots.
// Between them a Segment carries what is known. Integers alone are added and compared: results are
// the same on every device, and for every number of threads.
//
// Callers check that a plan and offsets make sense; the CUDA kernels, for which that would cost a
// synchronisation, guard themselves: offsets that do not ascend make an empty plan.
//
// All arrays are dense and row-major. The tokens of group g are [group_offsets[g],
// group_offsets[g + 1]); without offsets all tokens are one group.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

struct CapacityShape {
  std::int64_t rows, tokens, slots, experts, groups;  // rows of the plan, with its padding

  TORCH_ROUTERS_HOST_DEVICE std::int64_t all_slots() const { return tokens * slots; }
  TORCH_ROUTERS_HOST_DEVICE std::int64_t num_segments() const { return experts * groups; }
  TORCH_ROUTERS_HOST_DEVICE std::int64_t rows_or_slots() const {
    return rows > all_slots() ? rows : all_slots();
  }
};

struct Segment {
  std::int64_t first, rows, kept;
  std::uint64_t limit;     // kept are the keys below it, and of those equal to it
  std::int64_t ties;       // the first few
  std::int64_t new_first;  // row of the new plan
};

enum class DropPolicy { Position, Weight, Priority, Random };

template <class T> struct CapacitySelect : CapacityShape {
  const std::int64_t* order;          // [rows]
  const std::int64_t* offsets;        // [experts + 1]
  const std::int64_t* capacity;       // [groups]
  const T* scores;                    // Weight: [tokens, slots]; Priority: [tokens]; else null
  const std::int64_t* seed;           // scalar; Random only
  const std::int64_t* row_ids;        // [tokens]; null: 0, 1, ...
  const std::int64_t* group_offsets;  // [groups + 1]; null: one group
  DropPolicy policy;
  std::uint64_t* keys;  // [rows]; written where a segment loses some of its rows, but not all
  Segment* segments;    // [experts, groups]; all but new_first is written
};

struct CapacityPlace : CapacityShape {
  const std::int64_t* dropped;  // scalar
  Segment* segments;            // new_first is written
  std::int64_t* new_counts;     // [experts]
  std::int64_t* new_offsets;    // [experts + 1]
  std::int64_t* new_dropped;    // scalar
};

struct CapacityMove : CapacityShape {
  const std::int64_t* order;
  const std::uint64_t* keys;
  const Segment* segments;
  std::int64_t* new_order;  // [rows]; here its kept rows
  std::int64_t* new_rows;   // [rows]: where each row went, or -1
};

struct CapacityRenumber : CapacityShape {
  const std::int64_t* inverse;  // [tokens, slots]
  const std::int64_t* new_rows;
  const Segment* segments;
  std::int64_t* new_inverse;  // [tokens, slots]
  std::int64_t* new_order;    // here the rows behind the last expert's
};

// On the calling thread: segments [begin, end), all at once, segments, or rows and slots.
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T>
  void limit_capacity(const CapacitySelect<T>&, std::int64_t begin, std::int64_t end);
  void limit_capacity(const CapacityPlace&, std::int64_t, std::int64_t);
  void limit_capacity(const CapacityMove&, std::int64_t begin, std::int64_t end);
  void limit_capacity(const CapacityRenumber&, std::int64_t begin, std::int64_t end);
)

template <class Params>
void limit_capacity_cpu(const Params& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), limit_capacity(params, begin, end));
}

// All of it, queued on `stream` (a cudaStream_t) of the current device.
template <class T> void limit_capacity_cuda(const CapacitySelect<T>&, void* stream);
void limit_capacity_cuda(const CapacityPlace&, void* stream);
void limit_capacity_cuda(const CapacityMove&, void* stream);
void limit_capacity_cuda(const CapacityRenumber&, void* stream);

}  // namespace torch_routers
