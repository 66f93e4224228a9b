// From tokens to the rows of their experts, and back. A plan pairs slots with rows: order[r] is the
// slot t * slots + j of row r, inverse[t, j] the row of slot j of token t; -1 stands for none. With
//
//   L = sum over the pairs of w[t, j] <token[t], row[r]>
//
//   Permute          dL/drow     row[r] = w[t, j] token[t]; 0 in a row without a slot
//   Combine          dL/dtoken   token[t] = sum over j, in order, of w[t, j] row[r]; 0 if there is none
//   CombineBackward  dL/drow, and dL/dw: w[t, j] = <token[t], row[r]>; 0 for a slot without a row
//
// L is linear in each of the three, hence the derivatives of these functions are these functions
// again. Without weights they are 1. The weight of a slot without a row is never looked at. Sums are
// in Compute<T>, in an order that depends on `hidden` alone, and are rounded once.
//
// All arrays are dense and row-major. The CPU kernels rely on a plan whose order and inverse are
// each other's inverse; callers check that. The CUDA kernels, for which that would cost a
// synchronisation, guard themselves: a slot and a row that do not name each other have none.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

struct DispatchPlan {
  std::int64_t tokens, slots, max_rows, hidden;
  const std::int64_t* order;    // [max_rows]
  const std::int64_t* inverse;  // [tokens, slots]
};

template <class T> struct Permute : DispatchPlan {
  const T* token;             // [tokens, hidden]
  const Compute<T>* weights;  // [tokens, slots]; null: 1
  T* row;                     // [max_rows, hidden]
};

template <class T> struct Combine : DispatchPlan {
  const T* row;
  const Compute<T>* weights;  // null: 1
  T* token;
};

template <class T> struct CombineBackward : DispatchPlan {
  const T* token;             // the gradient of what Combine wrote
  const T* row;               // what Combine read, as the next
  const Compute<T>* weights;  // null: only grad_weights are wanted
  T* grad_row;
  Compute<T>* grad_weights;
};

// Zeros in the rows that have no slot. The CPU's Permute and CombineBackward leave them out.
template <class T> struct ClearUnused : DispatchPlan {
  T* row;
};

// On the calling thread: tokens, or of ClearUnused rows, [begin, end).
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T> void dispatch(const Permute<T>&, std::int64_t begin, std::int64_t end);
  template <class T> void dispatch(const Combine<T>&, std::int64_t begin, std::int64_t end);
  template <class T> void dispatch(const CombineBackward<T>&, std::int64_t begin, std::int64_t end);
  template <class T> void dispatch(const ClearUnused<T>&, std::int64_t begin, std::int64_t end);
)

template <class Params>
void dispatch_cpu(const Params& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), dispatch(params, begin, end));
}

// All of it, unused rows too, queued on `stream` (a cudaStream_t) of the current device.
template <class T> void dispatch_cuda(const Permute<T>&, void* stream);
template <class T> void dispatch_cuda(const Combine<T>&, void* stream);
template <class T> void dispatch_cuda(const CombineBackward<T>&, void* stream);

}  // namespace torch_routers
