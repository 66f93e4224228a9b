#include <cmath>

#include "bytes.h"
#include "gru_cell/gru_cell_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class T> struct Inputs {
  int64_t tokens, size;
  Array<T> input_gates, hidden_gates, state, grad_next;
  std::optional<Array<bool>> valid;

  explicit Inputs(Bytes& bytes)
      : tokens(bytes.size(0, 40)),
        size(bytes.size(0, 70)),
        input_gates(bytes.numbers<T>(3 * tokens * size, bytes.kind())),
        hidden_gates(bytes.numbers<T>(3 * tokens * size, bytes.kind())),
        state(bytes.numbers<T>(tokens * size, bytes.kind())),
        grad_next(bytes.numbers<T>(tokens * size, bytes.kind())) {
    if (bytes.flag()) valid.emplace(bytes.flags(tokens));
  }
};

template <class T> struct Results {
  Array<T> next, grad_input_gates, grad_hidden_gates, grad_state;

  Results(const Inputs<T>& in, Isa isa, double cut, unsigned char fill)
      : next(in.tokens * in.size, fill),
        grad_input_gates(3 * in.tokens * in.size, fill),
        grad_hidden_gates(3 * in.tokens * in.size, fill),
        grad_state(in.tokens * in.size, fill) {
    const auto run = [&](const auto& params) {
      in_parts(cut, in.tokens, [&](int64_t begin, int64_t end) {
        TORCH_ROUTERS_PICK_ISA(isa, gru_cell(params, begin, end));
      });
    };
    const GruStep<T> step{
        in.tokens,       in.size,       in.input_gates.data(), in.hidden_gates.data(),
        in.state.data(), data(in.valid)};
    run(GruCell<T>{step, next.data()});
    run(GruCellBackward<T>{step, in.grad_next.data(), grad_input_gates.data(),
                           grad_hidden_gates.data(), grad_state.data()});
  }

  bool operator==(const Results&) const = default;
};

// The state moves towards a number between -1 and 1; a masked token's does not move.
template <class T> void check_results(const Inputs<T>& in, const Results<T>& out) {
  for (int64_t t = 0; t < in.tokens; ++t)
    for (int64_t i = t * in.size; i < (t + 1) * in.size; ++i) {
      const T state = in.state[i], next = out.next[i];
      if (in.valid && !(*in.valid)[t]) {
        expect(std::memcmp(&state, &next, sizeof(T)) == 0, "a masked token to keep its state");
      } else if (next == next && std::isfinite(state)) {
        const T bound = std::max<T>(1, std::abs(state));
        expect(std::abs(next) <= bound * T(1.00001), "a state that does not grow");
      }
    }
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_routers::fuzz;
  Bytes bytes(data, size);
  bytes.pick_compute_type([&]<class T>() {
    run_twice<Inputs<T>, Results<T>>(
        bytes, [](const auto& in, const auto& out) { check_results(in, out); });
  });
  return 0;
}
