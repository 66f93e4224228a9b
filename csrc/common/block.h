// Vectors of one size for matrix products on the CPU, and the tile of a product of rows with rows:
// a running sum per lane of a block, over the terms, then a tree over the lanes. That order is fixed
// by the number of terms alone: the same bits on every instruction set, and for a row whatever the
// other rows are. Sums are in Compute<T>, rounded once.
#pragma once

#include "common/scalar.h"
#include "common/vector.h"

namespace torch_routers {

// A block of kBlockBytes is what all instruction sets have in common: a running sum per element.
// Tiles are as large as the registers allow, which changes no order of summation.
constexpr int kBlockBytes = 64, kParts = kBlockBytes / kVectorBytes;
constexpr int kTileRows = kVectorBytes == 64 ? 4 : kVectorBytes == 32 ? 2 : 1;
constexpr int kTileColumns = kVectorBytes == 64 ? 4 : 2;

template <class C> struct Block {
  Vector<C> part[kParts];
};
template <class T> constexpr int kBlockSize = kBlockBytes / sizeof(Compute<T>);

// Numbers as they are stored, from and to vectors of Compute<T>.
typedef std::uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
static inline Vector<float> load_part(const float* from) { return load_vector(from); }
static inline Vector<double> load_part(const double* from) { return load_vector(from); }
template <class T> static inline Vector<std::uint32_t> load_bits(const T* from) {
  HalfBits bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, Vector<std::uint32_t>);
}
static inline Vector<float> load_part(const BFloat16* from) {
  return reinterpret_cast<Vector<float>>(load_bits(from) << 16);
}
static inline Vector<float> load_part(const Float16* from) {  // the formula of load(Float16)
  const auto half = load_bits(from);
  const auto scaled = reinterpret_cast<Vector<float>>(half << 13 & 0x0fffe000u) * 0x1p112f;
  const auto special = reinterpret_cast<Vector<std::uint32_t>>((half & 0x7c00u) == 0x7c00u);
  return reinterpret_cast<Vector<float>>((half << 16 & 0x80000000u) |
                                         reinterpret_cast<Vector<std::uint32_t>>(scaled) |
                                         (special & 0x7f800000u));
}

template <class T> static inline Block<Compute<T>> load_block(const T* from) {
  Block<Compute<T>> block;
  for (int p = 0; p < kParts; ++p) block.part[p] = load_part(from + p * kWidth<Compute<T>>);
  return block;
}

// `size` elements, less than a block, and zeros.
template <class T> static inline Block<Compute<T>> load_block(const T* from, std::int64_t size) {
  T padded[kBlockSize<T>] = {};
  for (std::int64_t i = 0; i < size; ++i) padded[i] = from[i];
  return load_block(padded);
}

static inline void store_part(float* to, Vector<float> v) { __builtin_memcpy(to, &v, sizeof v); }
static inline void store_part(double* to, Vector<double> v) { __builtin_memcpy(to, &v, sizeof v); }
static inline void store_bits(void* to, Vector<std::uint32_t> bits) {
  const auto half = __builtin_convertvector(bits, HalfBits);
  __builtin_memcpy(to, &half, sizeof half);
}
static inline void store_part(BFloat16* to, Vector<float> v) {  // the formula of store(), as below
  const auto bits = reinterpret_cast<Vector<std::uint32_t>>(v);
  const auto rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  store_bits(to, v != v ? 0x7fc0u : rounded);
}
static inline void store_part(Float16* to, Vector<float> v) {
  const auto bits = reinterpret_cast<Vector<std::uint32_t>>(v);
  const auto magnitude = bits & 0x7fffffffu;
  const auto shifted = reinterpret_cast<Vector<float>>(magnitude) + 0.5f;
  const auto small = reinterpret_cast<Vector<std::uint32_t>>(shifted) - 0x3f000000u;
  const auto normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const auto finite = magnitude < 0x38800000u ? small : normal;
  const auto number = magnitude >= 0x477ff000u ? 0x7c00u : finite;
  store_bits(to, (bits >> 16 & 0x8000u) | (magnitude > 0x7f800000u ? 0x7e00u : number));
}

template <class T> static inline void store_block(T* to, const Block<Compute<T>>& block) {
  for (int p = 0; p < kParts; ++p) store_part(to + p * kWidth<Compute<T>>, block.part[p]);
}

// Its first `size` elements.
template <class T> static inline void store_block(T* to, const Block<Compute<T>>& block,
                                                  std::int64_t size) {
  T all[kBlockSize<T>];
  store_block(all, block);
  for (std::int64_t i = 0; i < size; ++i) to[i] = all[i];
}

template <class C> static inline void add(Block<C>& to, const Block<C>& block) {
  for (int p = 0; p < kParts; ++p) to.part[p] += block.part[p];
}

// The two-source shuffles that pair the halves of running sums: of groups of 2 * half lanes the
// lower halves, or the upper ones.
template <class C, int half> static inline Vector<C> halves(Vector<C> a, Vector<C> b, bool upper) {
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

// The numbers in even places of `count` blocks side by side, and then those in odd ones. Done n times,
// it makes columns of rows of 2^n numbers.
template <int count, class C> static inline void unzip(Block<C>* blocks) {
  constexpr int kHalf = count / 2;
  Block<C> from[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) from[i] = blocks[i];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const int a = 2 * (i % kHalf * kParts + p), b = a + 1;
      blocks[i].part[p] = halves<C, 1>(from[a / kParts].part[a % kParts],
                                       from[b / kParts].part[b % kParts], i >= kHalf);
    }
}

// The sums over the lanes of `count` vectors, side by side; the lanes are added as a tree.
template <int count, int half, class C> static inline void sum_lanes(Vector<C>* v) {
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

// y[i][j] = sum_k x[i][k] w[j][k] + bias[j] for a tile of rows and columns; x[i] is where row i is.
template <int rows, int columns, class T>
static inline void dot_tile(const T* const* x, const T* w, std::int64_t w_stride,
                            std::int64_t depth, const T* bias, T* y, std::int64_t y_stride) {
  using C = Compute<T>;
  Block<C> sum[rows][columns] = {};
  const auto add = [&](const auto& load) {
    Block<C> a[rows];
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) a[i] = load(x[i]);
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) {
      const Block<C> b = load(w + j * w_stride);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) sum[i][j].part[p] += a[i].part[p] * b.part[p];
    }
  };
  std::int64_t k = 0;
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

}  // namespace torch_routers
