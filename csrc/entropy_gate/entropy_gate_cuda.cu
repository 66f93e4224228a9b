// A warp per token. Not run on a GPU yet.
#include "common/cuda.cuh"
#include "entropy_gate/entropy_gate_kernel.h"
#include "entropy_gate/entropy_gate_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

struct WarpLanes {
  int64_t first;
  static constexpr int64_t step = kWarp;
  template <class X> __device__ X sum(X x) const { return warp_sum(x); }
  template <class X> __device__ X max(X x) const { return warp_max(x); }
  template <class T> __device__ Place<T> best(Place<T> place) const {
    const Bits<T> key = warp_max(place.key);
    // The first of those with this key; experts are far below 2^32.
    const std::uint32_t mine =
        place.key == key ? static_cast<std::uint32_t>(place.expert) : ~std::uint32_t{0};
    return {key, warp_min(mine)};
  }
};

template <class Params> __global__ void __launch_bounds__(kThreads, 1) entropy_rows(Params p) {
  const int64_t token = int64_t{blockIdx.x} * kWarps + warp();
  if (token < p.tokens) entropy_gate_row(p, token, WarpLanes{lane()});
}

template <class Params> void run(const Params& p, void* stream) {
  launch("entropy_gate", entropy_rows<Params>, (p.tokens + kWarps - 1) / kWarps, kThreads, stream,
         p);
}

}  // namespace

template <class T> void entropy_gate_cuda(const EntropyGate<T>& p, void* stream) { run(p, stream); }
template <class T> void entropy_gate_cuda(const EntropyGateBackward<T>& p, void* stream) {
  run(p, stream);
}

#define TORCH_ROUTERS_INSTANTIATE(T)                             \
  template void entropy_gate_cuda(const EntropyGate<T>&, void*); \
  template void entropy_gate_cuda(const EntropyGateBackward<T>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)

}  // namespace torch_routers
