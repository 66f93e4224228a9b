// One step of a gated recurrent unit, from the sums that its gates are made of. With a the
// part of the input and b that of the state, each element for itself:
//
//   r = sigmoid(a_r + b_r)     reset
//   c = sigmoid(a_c + b_c)     update: how much of the state is kept
//   n = tanh(a_n + r b_n)      candidate
//   h' = (1 - c) n + c h
//
// A masked token keeps its state, whatever its gates are.
//
//   dn = g (1 - c)             da_n = dn (1 - n^2)         db_n = da_n r
//   dc = g (h - n)             da_c = db_c = dc c (1 - c)
//   dr = da_n b_n              da_r = db_r = dr r (1 - r)
//   dh = g c
//
// of g, the gradient of h'; the matrix products before and behind are not part of it. The gates are
// computed anew for the backward. All arithmetic is in T.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

template <class T> struct GruStep {
  std::int64_t tokens, size;
  const T* input_gates;   // [tokens, 3, size]: of reset, update and candidate
  const T* hidden_gates;  // [tokens, 3, size]
  const T* state;         // [tokens, size]
  const bool* valid;      // [tokens]; null: all are
};

template <class T> struct GruCell : GruStep<T> {
  T* next;  // [tokens, size]
};

template <class T> struct GruCellBackward : GruStep<T> {
  const T* grad_next;    // [tokens, size]
  T* grad_input_gates;   // [tokens, 3, size]
  T* grad_hidden_gates;  // [tokens, 3, size]
  T* grad_state;         // [tokens, size]
};

// Tokens [begin, end) on the calling thread.
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T> void gru_cell(const GruCell<T>&, std::int64_t begin, std::int64_t end);
  template <class T> void gru_cell(const GruCellBackward<T>&, std::int64_t begin, std::int64_t end);
)

template <class Params>
void gru_cell_cpu(const Params& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), gru_cell(params, begin, end));
}

// All tokens, queued on `stream` (a cudaStream_t) of the current device.
template <class T> void gru_cell_cuda(const GruCell<T>&, void* stream);
template <class T> void gru_cell_cuda(const GruCellBackward<T>&, void* stream);

}  // namespace torch_routers
