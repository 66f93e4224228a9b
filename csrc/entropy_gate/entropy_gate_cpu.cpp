#include "entropy_gate/entropy_gate_kernel.h"
#include "entropy_gate/entropy_gate_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

struct OneLane {
  static constexpr int64_t first = 0, step = 1;
  template <class X> X sum(X x) const { return x; }
  template <class X> X max(X x) const { return x; }
  template <class T> Place<T> best(Place<T> place) const { return place; }
};

}  // namespace

template <class T> void entropy_gate(const EntropyGate<T>& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) entropy_gate_row(p, token, OneLane{});
}
template <class T> void entropy_gate(const EntropyGateBackward<T>& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) entropy_gate_row(p, token, OneLane{});
}

#define TORCH_ROUTERS_INSTANTIATE(T)                                 \
  template void entropy_gate(const EntropyGate<T>&, int64_t, int64_t); \
  template void entropy_gate(const EntropyGateBackward<T>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
