// One matrix product per group of rows; group g has the rows [offsets[g], offsets[g + 1]).
//
//   linear   y[n] = weight[g] x[n] + bias[g]                 its gradient of x is linear again,
//                                                            with the weight transposed
//   outer    result[g] = sum over its rows of outer(y[n], x[n])    the gradient of the weight
//
// For few rows per group: nothing is packed, every weight is read once where it lies. Two loops:
//
//   dot        the elements of a weight's row lie side by side along the inputs: kDotLanes running
//              sums over the inputs, then a tree
//   broadcast  they lie side by side along the outputs (a transposed weight; outer): one running sum
//              per output, restarted every kDepth terms and added up
//
// Both orders are fixed by the sizes alone: the same bits on every instruction set, for every
// number of threads, and for a row whatever the other rows are. Sums are in Compute<T>, rounded once.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace torch_routers {

template <class T> struct GroupedLinear {
  std::int64_t outputs, inputs;  // features
  const std::int64_t* offsets;   // [groups + 1]
  const T* x;                    // [rows, inputs], rows `x_stride` apart
  const T* weight;               // [groups, outputs, inputs], groups `weight_group` apart
  const T* bias;                 // [groups, outputs]; null: none
  T* y;                          // [rows, outputs]
  std::int64_t x_stride, weight_group;
  std::int64_t weight_output, weight_input;  // strides; one of them is 1
};

template <class T> struct GroupedOuter {
  std::int64_t outputs, inputs;
  const std::int64_t* offsets;
  const T* y;  // [rows, outputs]
  const T* x;  // [rows, inputs]
  T* result;   // [groups, outputs, inputs]; 0 for a group without rows
  std::int64_t y_stride, x_stride;
};

// On the calling thread: the outputs [begin, end) of one group.
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T>
  void grouped(const GroupedLinear<T>&, std::int64_t group, std::int64_t begin, std::int64_t end);
  template <class T>
  void grouped(const GroupedOuter<T>&, std::int64_t group, std::int64_t begin, std::int64_t end);
)

template <class Params>
void grouped_cpu(const Params& params, std::int64_t group, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), grouped(params, group, begin, end));
}

}  // namespace torch_routers
