// Inputs and results of the recurrent cell, in the memory of the CPU or of a device.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "gru_cell/gru_cell_kernel.h"
#include "host_array.h"

namespace torch_routers {

template <class T> struct GruResults {
  std::vector<T> next, grad_input_gates, grad_hidden_gates, grad_state;
  bool operator==(const GruResults&) const = default;
};

template <class T> struct GruProblem {
  std::int64_t tokens, size;
  std::vector<T> input_gates, hidden_gates, state, grad_next;
  std::vector<unsigned char> valid;  // every third token from the second on is masked

  GruProblem(std::int64_t tokens, std::int64_t size) : tokens(tokens), size(size) {
    std::mt19937 random(static_cast<unsigned>(tokens * 1000 + size));
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<T>& values, std::int64_t columns, double spread) {
      for (std::int64_t i = 0; i < tokens * columns; ++i)
        values.push_back(static_cast<T>(spread * normal(random)));
    };
    fill(input_gates, 3 * size, 2);
    fill(hidden_gates, 3 * size, 2);
    fill(state, size, 0.5);
    fill(grad_next, size, 1);
    for (std::int64_t t = 0; t < tokens; ++t) valid.push_back(t % 3 != 1);
  }

  // `run(params, tokens)` runs one of the two kernels.
  template <template <class> class Array, class Run> GruResults<T> run(const Run& run) const {
    const Array<T> a(input_gates), b(hidden_gates), h(state), grad(grad_next);
    const Array<unsigned char> mask(valid);
    const Array<T> next(state.size()), grad_a(input_gates.size()), grad_b(input_gates.size()),
        grad_h(state.size());
    const GruStep<T> step{tokens,   size,     a.data(),
                          b.data(), h.data(), reinterpret_cast<const bool*>(mask.data())};
    run(GruCell<T>{step, next.data()}, tokens);
    run(GruCellBackward<T>{step, grad.data(), grad_a.data(), grad_b.data(), grad_h.data()}, tokens);
    return {next.to_host(), grad_a.to_host(), grad_b.to_host(), grad_h.to_host()};
  }
};

}  // namespace torch_routers
