#include "common/row.h"
#include "common/scalar.h"
#include "common/vector.h"
#include "grouped_linear/grouped_linear_kernel.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

// A block of kBlockBytes is what all instruction sets have in common: a running sum per element.
// Tiles are as large as the registers allow, which changes no order of summation.
constexpr int kBlockBytes = 64, kParts = kBlockBytes / kVectorBytes;
constexpr int kTileRows = kVectorBytes == 64 ? 4 : kVectorBytes == 32 ? 2 : 1;
constexpr int kTileColumns = kVectorBytes == 64 ? 4 : 2;
constexpr int64_t kDepth = 512;

template <class C> struct Block {
  Vector<C> part[kParts];
};
template <class T> constexpr int kBlockSize = kBlockBytes / sizeof(Compute<T>);

// Numbers as they are stored, from and to vectors of Compute<T>.
typedef std::uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
inline Vector<float> load_part(const float* from) { return load_vector(from); }
inline Vector<double> load_part(const double* from) { return load_vector(from); }
template <class T> inline Vector<std::uint32_t> load_bits(const T* from) {
  HalfBits bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, Vector<std::uint32_t>);
}
inline Vector<float> load_part(const BFloat16* from) {
  return reinterpret_cast<Vector<float>>(load_bits(from) << 16);
}
inline Vector<float> load_part(const Float16* from) {  // the formula of load(Float16)
  const auto half = load_bits(from);
  const auto scaled = reinterpret_cast<Vector<float>>(half << 13 & 0x0fffe000u) * 0x1p112f;
  const auto special = reinterpret_cast<Vector<std::uint32_t>>((half & 0x7c00u) == 0x7c00u);
  return reinterpret_cast<Vector<float>>((half << 16 & 0x80000000u) |
                                         reinterpret_cast<Vector<std::uint32_t>>(scaled) |
                                         (special & 0x7f800000u));
}

template <class T> inline Block<Compute<T>> load_block(const T* from) {
  Block<Compute<T>> block;
  for (int p = 0; p < kParts; ++p) block.part[p] = load_part(from + p * kWidth<Compute<T>>);
  return block;
}

// `size` elements, less than a block, and zeros.
template <class T> inline Block<Compute<T>> load_block(const T* from, int64_t size) {
  T padded[kBlockSize<T>] = {};
  for (int64_t i = 0; i < size; ++i) padded[i] = from[i];
  return load_block(padded);
}

inline void store_part(float* to, Vector<float> v) { __builtin_memcpy(to, &v, sizeof v); }
inline void store_part(double* to, Vector<double> v) { __builtin_memcpy(to, &v, sizeof v); }
inline void store_bits(void* to, Vector<std::uint32_t> bits) {
  const auto half = __builtin_convertvector(bits, HalfBits);
  __builtin_memcpy(to, &half, sizeof half);
}
inline void store_part(BFloat16* to, Vector<float> v) {  // the formula of store(), as below
  const auto bits = reinterpret_cast<Vector<std::uint32_t>>(v);
  const auto rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  store_bits(to, v != v ? 0x7fc0u : rounded);
}
inline void store_part(Float16* to, Vector<float> v) {
  const auto bits = reinterpret_cast<Vector<std::uint32_t>>(v);
  const auto magnitude = bits & 0x7fffffffu;
  const auto shifted = reinterpret_cast<Vector<float>>(magnitude) + 0.5f;
  const auto small = reinterpret_cast<Vector<std::uint32_t>>(shifted) - 0x3f000000u;
  const auto normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const auto finite = magnitude < 0x38800000u ? small : normal;
  const auto number = magnitude >= 0x477ff000u ? 0x7c00u : finite;
  store_bits(to, (bits >> 16 & 0x8000u) | (magnitude > 0x7f800000u ? 0x7e00u : number));
}

template <class T> inline void store_block(T* to, const Block<Compute<T>>& block) {
  for (int p = 0; p < kParts; ++p) store_part(to + p * kWidth<Compute<T>>, block.part[p]);
}

// Its first `size` elements.
template <class T> inline void store_block(T* to, const Block<Compute<T>>& block, int64_t size) {
  T all[kBlockSize<T>];
  store_block(all, block);
  for (int64_t i = 0; i < size; ++i) to[i] = all[i];
}

template <class C> inline void add(Block<C>& to, const Block<C>& block) {
  for (int p = 0; p < kParts; ++p) to.part[p] += block.part[p];
}

// ---- dot ---------------------------------------------------------------------------------------

// The two-source shuffles that pair the halves of running sums: of groups of 2 * half lanes the
// lower halves, or the upper ones.
template <class C, int half> inline Vector<C> halves(Vector<C> a, Vector<C> b, bool upper) {
  using Index = Vector<Bits<C>>;
  Index index;
  for (int lane = 0; lane < kWidth<C>; ++lane)
    index[lane] = lane / half * 2 * half + lane % half + (upper ? half : 0);
#if defined(__clang__)  // has no such builtin, and makes shuffles of this loop
  Vector<C> result;
  for (int lane = 0; lane < kWidth<C>; ++lane) {
    const auto from = static_cast<int>(index[lane]);
    result[lane] = from < kWidth<C> ? a[from] : b[from - kWidth<C>];
  }
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// The sums over the lanes of `count` vectors, side by side; the lanes are added as a tree.
template <int count, int half, class C> inline void sum_lanes(Vector<C>* v) {
  if constexpr (half > 0) {
    constexpr int pairs = count > 1 ? count / 2 : 1;
#pragma GCC unroll 16
    for (int i = 0; i < pairs; ++i) {
      const Vector<C> a = v[2 * i], b = v[count > 1 ? 2 * i + 1 : 0];
      v[i] = halves<C, half>(a, b, false) + halves<C, half>(a, b, true);
    }
    sum_lanes<pairs, half / 2, C>(v);
  }
}

// y[i][j] = sum_k x[i][k] w[j][k] + bias[j] for a tile of rows and columns.
template <int rows, int columns, class T>
inline void dot_tile(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t depth,
                     const T* bias, T* y, int64_t y_stride) {
  using C = Compute<T>;
  Block<C> sum[rows][columns] = {};
  const auto add = [&](const auto& load) {
    Block<C> a[rows];
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) a[i] = load(x + i * x_stride);
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) {
      const Block<C> b = load(w + j * w_stride);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) sum[i][j].part[p] += a[i].part[p] * b.part[p];
    }
  };
  int64_t k = 0;
  for (; k + kBlockSize<T> <= depth; k += kBlockSize<T>)
    add([&](const T* row) { return load_block(row + k); });
  if (k < depth) add([&](const T* row) { return load_block(row + k, depth - k); });

  constexpr int count = rows * columns, kSize = kWidth<C>;
  Vector<C> v[count];
#pragma GCC unroll 16
  for (int n = 0; n < count; ++n) {
    Block<C> block = sum[n / columns][n % columns];
    for (int half = kParts / 2; half > 0; half /= 2)
      for (int p = 0; p < half; ++p) block.part[p] += block.part[p + half];
    v[n] = block.part[0];
  }
  sum_lanes<count, kSize / 2, C>(v);
  C results[count > kSize ? count : kSize], offset[columns];
  for (int n = 0; n * kSize < count; ++n) __builtin_memcpy(results + n * kSize, &v[n], sizeof v[n]);
  for (int j = 0; j < columns; ++j) offset[j] = bias ? load(bias[j]) : C{0};
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j)
      store(y + i * y_stride + j, results[i * columns + j] + offset[j]);
}

// The outputs [begin, end) of `rows` rows. A few rows of the weight stay in the cache while all rows
// of x pass.
template <class T>
void dot(const GroupedLinear<T>& p, const T* x, int64_t rows, const T* w, const T* bias, T* y,
         int64_t begin, int64_t end) {
  const auto column = [&]<int columns>(int64_t j) {
    const auto tile = [&]<int tile_rows>(int64_t i) {
      dot_tile<tile_rows, columns>(x + i * p.x_stride, p.x_stride, w + j * p.weight_output,
                                   p.weight_output, p.inputs, bias ? bias + j : nullptr,
                                   y + i * p.outputs + j, p.outputs);
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
