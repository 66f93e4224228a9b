#include "common/block.h"
#include "grouped_linear/grouped_linear_kernel.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

constexpr int64_t kDepth = 512;

// The outputs [begin, end) of `rows` rows. A few rows of the weight stay in the cache while all rows
// of x pass.
template <class T>
void dot(const GroupedLinear<T>& p, const T* x, int64_t rows, const T* w, const T* bias, T* y,
         int64_t begin, int64_t end) {
  const auto column = [&]<int columns>(int64_t j) {
    const auto tile = [&]<int tile_rows>(int64_t i) {
      const T* x_rows[tile_rows];
      for (int n = 0; n < tile_rows; ++n) x_rows[n] = x + (i + n) * p.x_stride;
      dot_tile<tile_rows, columns>(x_rows, w + j * p.weight_output, p.weight_output, p.inputs,
                                   bias ? bias + j : nullptr, y + i * p.outputs + j, p.outputs);
    };
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) tile.template operator()<kTileRows>(i);
    if constexpr (kTileRows > 2)
      for (; i + 2 <= rows; i += 2) tile.template operator()<2>(i);
    for (; i < rows; ++i) tile.template operator()<1>(i);
  };
  int64_t j = begin;
  for (; j + kTileColumns <= end; j += kTileColumns) column.template operator()<kTileColumns>(j);
  for (; j < end; ++j) column.template operator()<1>(j);
}

// ---- broadcast ---------------------------------------------------------------------------------

// c[i][j] = sum_k a[i][k] b[k][j] + bias[j], for `rows` rows and `blocks` blocks of columns; of the
// last block only `size` columns.
template <int rows, int blocks, class T>
inline void broadcast_tile(const T* a, int64_t a_row, int64_t a_term, const T* b, int64_t b_term,
                           int64_t depth, const T* bias, T* c, int64_t c_row, int64_t size) {
  using C = Compute<T>;
  constexpr int kSize = kBlockSize<T>;
  const auto sum_of = [&](int64_t begin, int64_t end, Block<C>(&sum)[rows][blocks]) {
    const auto add_term = [&](int64_t k, const auto& load_terms) {
      Block<C> terms[blocks];
#pragma GCC unroll 4
      for (int j = 0; j < blocks; ++j) terms[j] = load_terms(b + k * b_term + j * kSize);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        const C factor = load(a[i * a_row + k * a_term]);
#pragma GCC unroll 4
        for (int j = 0; j < blocks; ++j)
#pragma GCC unroll 4
          for (int p = 0; p < kParts; ++p) sum[i][j].part[p] += factor * terms[j].part[p];
      }
    };
    int64_t k = begin;
    if (blocks == 1 && size < kSize)
      for (; k < end; ++k) add_term(k, [&](const T* from) { return load_block(from, size); });
    for (; k < end; ++k) add_term(k, [&](const T* from) { return load_block(from); });
  };
  Block<C> total[rows][blocks] = {};
  sum_of(0, depth < kDepth ? depth : kDepth, total);
  for (int64_t begin = kDepth; begin < depth; begin += kDepth) {
    Block<C> sum[rows][blocks] = {};
    sum_of(begin, depth - begin < kDepth ? depth : begin + kDepth, sum);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < blocks; ++j) add(total[i][j], sum[i][j]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < blocks; ++j) {
    const bool whole = blocks > 1 || size == kSize;
    Block<C> offset = {};
    if (bias) offset = whole ? load_block(bias + j * kSize) : load_block(bias, size);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      T* to = c + i * c_row + j * kSize;
      add(total[i][j], offset);
      if (whole)
        store_block(to, total[i][j]);
      else
        store_block(to, total[i][j], size);
    }
  }
}

// All columns [0, columns) of `rows` rows. A few columns of b stay in the cache while all rows pass.
template <class T>
void broadcast(const T* a, int64_t a_row, int64_t a_term, int64_t rows, const T* b, int64_t b_term,
               int64_t depth, const T* bias, T* c, int64_t c_row, int64_t columns) {
  const auto column = [&]<int blocks>(int64_t j, int64_t size) {
    const auto tile = [&]<int tile_rows>(int64_t i) {
      broadcast_tile<tile_rows, blocks>(a + i * a_row, a_row, a_term, b + j, b_term, depth,
                                        bias ? bias + j : nullptr, c + i * c_row + j, c_row, size);
    };
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) tile.template operator()<kTileRows>(i);
    for (; i < rows; ++i) tile.template operator()<1>(i);
  };
  constexpr int kSize = kBlockSize<T>;
  int64_t j = 0;
  for (; j + kTileColumns * kSize <= columns; j += kTileColumns * kSize)
    column.template operator()<kTileColumns>(j, kSize);
  for (; j < columns; j += kSize)
    column.template operator()<1>(j, columns - j < kSize ? columns - j : kSize);
}

}  // namespace

template <class T>
void grouped(const GroupedLinear<T>& params, int64_t group, int64_t begin, int64_t end) {
  GroupedLinear<T> p = params;
  if (p.inputs == 0) {  // then there may be no memory to step through
    p.x_stride = p.weight_group = p.weight_output = 0;
    p.weight_input = 1;
  }
  const int64_t first = p.offsets[group], rows = p.offsets[group + 1] - first;
  const T* x = p.x + first * p.x_stride;
  const T* w = p.weight + group * p.weight_group;
  const T* bias = p.bias ? p.bias + group * p.outputs : nullptr;
  T* y = p.y + first * p.outputs;
  if (p.weight_input == 1) return dot(p, x, rows, w, bias, y, begin, end);
  broadcast(x, p.x_stride, 1, rows, w + begin, p.weight_input, p.inputs,
            bias ? bias + begin : nullptr, y + begin, p.outputs, end - begin);
}

template <class T>
void grouped(const GroupedOuter<T>& p, int64_t group, int64_t begin, int64_t end) {
  if (p.inputs == 0) return;
  const int64_t first = p.offsets[group], rows = p.offsets[group + 1] - first;
  // A few outputs at a time, over all inputs: the result, not the rows, is what fills the memory.
  for (int64_t o = begin; o < end; o += kTileRows)
    broadcast<T>(p.y + first * p.y_stride + o, 1, p.y_stride,
                 end - o < kTileRows ? end - o : kTileRows, p.x + first * p.x_stride, p.x_stride,
                 rows, nullptr, p.result + (group * p.outputs + o) * p.inputs, p.inputs, p.inputs);
}

#define TORCH_ROUTERS_INSTANTIATE(T)                                             \
  template void grouped(const GroupedLinear<T>&, int64_t, int64_t, int64_t); \
  template void grouped(const GroupedOuter<T>&, int64_t, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
