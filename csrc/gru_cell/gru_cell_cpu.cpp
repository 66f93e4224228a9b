#include "gru_cell/gru_cell_kernel.h"
#include "gru_cell/gru_cell_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

// Elements of a token do not depend on each other, and nothing is written that another one reads:
// the compiler makes vectors of them, once it is told.
template <class Params> void for_each_token(const Params& params, int64_t begin, int64_t end) {
  const Params p = params;  // whose fields no store can change
  for (int64_t token = begin; token < end; ++token) {
    if (p.valid && !p.valid[token]) {
      for (int64_t i = 0; i < p.size; ++i) keep_element(p, token, i);
      continue;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < p.size; ++i) gru_element(p, token, i);
  }
}

}  // namespace

template <class T> void gru_cell(const GruCell<T>& p, int64_t begin, int64_t end) {
  for_each_token(p, begin, end);
}
template <class T> void gru_cell(const GruCellBackward<T>& p, int64_t begin, int64_t end) {
  for_each_token(p, begin, end);
}

#define TORCH_ROUTERS_INSTANTIATE(T)                          \
  template void gru_cell(const GruCell<T>&, int64_t, int64_t); \
  template void gru_cell(const GruCellBackward<T>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
