// Formulas of gru_cell_kernel.h for one element, shared by CPU and CUDA.
#pragma once

#include "common/score.h"
#include "gru_cell/gru_cell_kernel.h"

namespace torch_routers {

// Near 0 the quotient of polynomials that the continued fraction of tanh begins with, elsewhere
// 1 - 2 / (1 + e^2|x|); within 4 units in the last place. Both are computed, so that a loop over it
// becomes vectors.
template <class T> TORCH_ROUTERS_HOST_DEVICE static inline T own_tanh(T x) {
  const T z = x * x, size = x < 0 ? -x : x;
  const T above = ((z + T{378}) * z + T{17325}) * z + T{135135};
  const T below = ((T{28} * z + T{3150}) * z + T{62370}) * z + T{135135};
  const T far = T{1} - T{2} / (T{1} + own_exp(T{2} * size));
  return size < T{0.5} ? x * above / below : x < 0 ? -far : far;
}

// Unnamed, for the reason why functions are `static` here: see common/scalar.h.
namespace {

// What the step of element `i` of a token is made of.
template <class T> struct GruElement {
  T reset, update, candidate, hidden, state;  // hidden: b_n

  TORCH_ROUTERS_HOST_DEVICE GruElement(const GruStep<T>& p, std::int64_t token, std::int64_t i) {
    const T* a = p.input_gates + token * 3 * p.size + i;
    const T* b = p.hidden_gates + token * 3 * p.size + i;
    reset = sigmoid(a[0] + b[0]);
    update = sigmoid(a[p.size] + b[p.size]);
    hidden = b[2 * p.size];
    candidate = own_tanh(a[2 * p.size] + reset * hidden);
    state = p.state[token * p.size + i];
  }

  TORCH_ROUTERS_HOST_DEVICE T next() const { return (T{1} - update) * candidate + update * state; }
};

}  // namespace

// Writes h' of an element.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline void gru_element(const GruCell<T>& p, std::int64_t token,
                                                         std::int64_t i) {
  p.next[token * p.size + i] = GruElement<T>(p, token, i).next();
}
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline void keep_element(const GruCell<T>& p, std::int64_t token,
                                                          std::int64_t i) {
  p.next[token * p.size + i] = p.state[token * p.size + i];
}

// Writes the gradients of an element.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline void gru_element(const GruCellBackward<T>& p,
                                                         std::int64_t token, std::int64_t i) {
  const GruElement<T> e(p, token, i);
  const T grad = p.grad_next[token * p.size + i];
  const T candidate = grad * (T{1} - e.update) * (T{1} - e.candidate * e.candidate);
  const T update = grad * (e.state - e.candidate) * e.update * (T{1} - e.update);
  const T reset = candidate * e.hidden * e.reset * (T{1} - e.reset);
  T* a = p.grad_input_gates + token * 3 * p.size + i;
  T* b = p.grad_hidden_gates + token * 3 * p.size + i;
  a[0] = b[0] = reset;
  a[p.size] = b[p.size] = update;
  a[2 * p.size] = candidate;
  b[2 * p.size] = candidate * e.reset;
  p.grad_state[token * p.size + i] = grad * e.update;
}
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline void keep_element(const GruCellBackward<T>& p,
                                                          std::int64_t token, std::int64_t i) {
  for (std::int64_t gate = 0; gate < 3; ++gate) {
    const std::int64_t place = (token * 3 + gate) * p.size + i;
    p.grad_input_gates[place] = p.grad_hidden_gates[place] = 0;
  }
  p.grad_state[token * p.size + i] = p.grad_next[token * p.size + i];
}

}  // namespace torch_routers
