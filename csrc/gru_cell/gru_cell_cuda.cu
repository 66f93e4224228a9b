// A thread per element: neighbours read and write neighbouring numbers. Not run on a GPU yet.
#include "common/cuda.cuh"
#include "gru_cell/gru_cell_kernel.h"
#include "gru_cell/gru_cell_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kThreads = 256;

template <class Params> __global__ void __launch_bounds__(kThreads) gru_elements(Params p) {
  const int64_t place = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (place >= p.tokens * p.size) return;
  const int64_t token = place / p.size, i = place % p.size;
  if (p.valid && !p.valid[token])
    keep_element(p, token, i);
  else
    gru_element(p, token, i);
}

template <class Params> void run(const Params& p, void* stream) {
  const int64_t blocks = (p.tokens * p.size + kThreads - 1) / kThreads;
  launch("gru_cell", gru_elements<Params>, blocks, kThreads, stream, p);
}

}  // namespace

template <class T> void gru_cell_cuda(const GruCell<T>& p, void* stream) { run(p, stream); }
template <class T> void gru_cell_cuda(const GruCellBackward<T>& p, void* stream) { run(p, stream); }

#define TORCH_ROUTERS_INSTANTIATE(T)                      \
  template void gru_cell_cuda(const GruCell<T>&, void*); \
  template void gru_cell_cuda(const GruCellBackward<T>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)

}  // namespace torch_routers
