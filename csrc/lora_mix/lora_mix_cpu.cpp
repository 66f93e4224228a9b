#include <algorithm>

#include "common/block.h"
#include "lora_mix/lora_mix_kernel.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

// What tiles read over and over stays in the first cache: so many bytes of rows of x in shrink, and
// of expand and outer what is packed, a few blocks of columns for all that is read there. (Where it
// lies, rows are often a power of two apart, and a cache then holds few of them.)
constexpr int64_t kRowBytes = 16 << 10, kPackedBytes = 128 << 10;
constexpr int kExpandBlocks = kVectorBytes == 64 ? 4 : kVectorBytes == 32 ? 3 : 2;
constexpr int64_t kTokenBlock = 128;  // that share what is packed
constexpr int64_t kDepth = 512;       // rows per running sum of outer
constexpr int64_t kOuterRanks = 64;

// `rows` rows of `columns` columns, wherever row(n) is, as they are added; 0 in columns behind.
template <int blocks, class T, class Row>
inline void pack(int64_t rows, int64_t columns, const Row& row, Compute<T>* packed) {
  constexpr int kSize = kBlockSize<T>;
  for (int64_t n = 0; n < rows; ++n) {
    const T* from = row(n);
    for (int b = 0; b < blocks; ++b, packed += kSize) {
      const int64_t size = columns - b * kSize;
      store_block(packed, size >= kSize ? load_block(from + b * kSize)
                                        : load_block(from + b * kSize, std::max<int64_t>(size, 0)));
    }
  }
}

// Calls visit(e, r, count) for pieces of the rows [begin, end), each of one expert, and with as many
// rows as stay in the cache. Returns the first row that is no expert's.
template <class Params, class Visit>
int64_t for_each_piece(const Params& p, int64_t row_bytes, int64_t begin, int64_t end,
                       const Visit& visit) {
  const int64_t* past = std::upper_bound(p.offsets, p.offsets + p.experts + 1, begin);
  const int64_t block = std::max<int64_t>(kRowBytes / std::max<int64_t>(1, row_bytes), kTileRows);
  int64_t r = begin;
  for (int64_t e = past - p.offsets - 1; e < p.experts && r < end; ++e)
    for (const int64_t last = std::min(end, p.offsets[e + 1]); r < last;) {
      const int64_t count = std::min(block, last - r);
      visit(e, r, count);
      r += count;
    }
  return r;
}

// z[i][j] = <weight[j], x[tokens[i]]> for `count` rows and `rank` columns; 0 in those up to `stride`.
template <class T>
void shrink_rows(const T* x, int64_t features, const int64_t* tokens, int64_t count,
                 const T* weight, int64_t rank, T* z, int64_t stride) {
  const auto column = [&]<int columns>(int64_t j) {
    const auto tile = [&]<int tile_rows>(int64_t i) {
      const T* rows[tile_rows];
      for (int n = 0; n < tile_rows; ++n) rows[n] = x + tokens[i + n] * features;
      dot_tile<tile_rows, columns, T>(rows, weight + j * features, features, features, nullptr,
                                      z + i * stride + j, stride);
    };
    int64_t i = 0;
    for (; i + kTileRows <= count; i += kTileRows) tile.template operator()<kTileRows>(i);
    if constexpr (kTileRows > 2)
      for (; i + 2 <= count; i += 2) tile.template operator()<2>(i);
    for (; i < count; ++i) tile.template operator()<1>(i);
  };
  int64_t j = 0;
  for (; j + kTileColumns <= rank; j += kTileColumns) column.template operator()<kTileColumns>(j);
  for (; j < rank; ++j) column.template operator()<1>(j);
  for (int64_t i = 0; i < count; ++i) std::fill(z + i * stride + rank, z + (i + 1) * stride, T{});
}

// y[t] for the `columns` features from f on, at most `blocks` blocks. `weight`: those columns of the
// weight, packed, or of type T where it lies.
template <int blocks, class T, class W>
inline void expand_tile(const LoraExpand<T>& p, const int64_t* experts, int64_t t, int64_t f,
                        int64_t columns, const W* weight, int64_t stride) {
  using C = Compute<T>;
  constexpr int kSize = kBlockSize<T>;
  Block<C> sum[blocks] = {};
  for (int64_t s = 0; s < p.slots; ++s) {
    const int64_t r = p.inverse[t * p.slots + s];
    if (r < 0) continue;
    const int64_t e = experts[r], rank = p.ranks[e + 1] - p.ranks[e];
    const T* z = p.z + r * p.max_rank;
    const W* from = weight + p.ranks[e] * stride;
    const auto add_terms = [&](const auto& load_terms) {
      for (int64_t j = 0; j < rank; ++j, from += stride) {
        const C factor = load(z[j]);
#pragma GCC unroll 4
        for (int b = 0; b < blocks; ++b) {
          const Block<C> terms = load_terms(from + b * kSize);
#pragma GCC unroll 4
          for (int q = 0; q < kParts; ++q) sum[b].part[q] += factor * terms.part[q];
        }
      }
    };
    if (blocks > 1 || columns >= kSize || stride == kSize)
      add_terms([](const W* part) { return load_block(part); });
    else
      add_terms([=](const W* part) { return load_block(part, columns); });
  }
  T* y = p.y + t * p.features + f;
  for (int b = 0; b < blocks; ++b)
    if (const int64_t size = columns - b * kSize; size >= kSize)
      store_block(y + b * kSize, sum[b]);
    else if (size > 0)
      store_block(y + b * kSize, sum[b], size);
}

// total[i] += sum_k z[k][i] x[k] for `rows` of the ranks, x being packed.
template <int rows, int blocks, class T>
inline void outer_tile(const T* z, int64_t max_rank, const Compute<T>* x, int64_t count,
                       Compute<T>* total) {
  using C = Compute<T>;
  constexpr int kSize = kBlockSize<T>;
  Block<C> sum[rows][blocks] = {};
  for (int64_t k = 0; k < count; ++k, z += max_rank, x += blocks * kSize) {
    Block<C> terms[blocks];
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) terms[b] = load_block(x + b * kSize);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const C factor = load(z[i]);
#pragma GCC unroll 4
      for (int b = 0; b < blocks; ++b)
#pragma GCC unroll 4
        for (int q = 0; q < kParts; ++q) sum[i][b].part[q] += factor * terms[b].part[q];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int b = 0; b < blocks; ++b, total += kSize) {
      add(sum[i][b], load_block(total));
      store_block(total, sum[i][b]);
    }
}

// result[ranks[e] + j][f] for the `columns` features from f on and `count` of the ranks j.
template <class T>
void outer_columns(const LoraOuter<T>& p, const int64_t* tokens, int64_t e, int64_t j,
                   int64_t count, int64_t f, int64_t columns) {
  using C = Compute<T>;
  constexpr int kBlocks = kTileColumns, kSize = kBlockSize<T>, kWide = kBlocks * kSize;
  C packed[kDepth * kWide], total[kOuterRanks * kWide] = {};
  for (int64_t r = p.offsets[e]; r < p.offsets[e + 1]; r += kDepth) {
    const int64_t rows = std::min(kDepth, p.offsets[e + 1] - r);
    const auto row = [&](int64_t n) { return p.x + tokens[r + n] * p.features + f; };
    pack<kBlocks, T>(rows, columns, row, packed);
    const T* z = p.z + r * p.max_rank + j;
    int64_t i = 0;
    for (; i + kTileRows <= count; i += kTileRows)
      outer_tile<kTileRows, kBlocks>(z + i, p.max_rank, packed, rows, total + i * kWide);
    for (; i < count; ++i)
      outer_tile<1, kBlocks>(z + i, p.max_rank, packed, rows, total + i * kWide);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < columns; ++c)
      store(p.result + (p.ranks[e] + j + i) * p.features + f + c, total[i * kWide + c]);
}

// sums[t] += sum_j z[r][j] b[f:f + features][j] for the rows r of expert e, of token t, and `count` j
// from `first` on. The features are at most a block.
template <int count, class T>
void add_columns(const LoraInfer<T>& p, int64_t e, int64_t first, int64_t f, int64_t features,
                 Compute<T>* sums) {
  constexpr int kSize = kBlockSize<T>;
  const int64_t rank = p.ranks[e];
  const T *from = p.b[e] + f * rank + first, *end = p.b[e] + p.features * rank;
  Block<Compute<T>> columns[kSize];
  if (features == kSize && count == rank) {  // rows are side by side
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) columns[i] = load_block(from + i * kSize);
    if constexpr (count > 1)
      for (int n = 1; n < count; n *= 2) unzip<count>(columns);
  } else {
    for (int i = 0; i < kSize; ++i, from += rank) {
      // With numbers of the next row, which become columns that nobody reads.
      const int64_t size = i < features ? std::min<int64_t>(kSize, end - from) : 0;
      columns[i] = size == kSize ? load_block(from) : load_block(from, size);
    }
    for (int n = 1; n < kSize; n *= 2) unzip<kSize>(columns);
  }
  for (int64_t r = p.offsets[e]; r < p.offsets[e + 1]; ++r) {
    const T* z = p.z + r * p.max_rank + first;
    Compute<T>* to = sums + p.token_of[r] * p.kWide;
    Block<Compute<T>> sum = load_block(to);
#pragma GCC unroll 16
    for (int j = 0; j < count; ++j)
#pragma GCC unroll 4
      for (int q = 0; q < kParts; ++q) sum.part[q] += load(z[j]) * columns[j].part[q];
    store_block(to, sum);
  }
}

template <class T>
void add_block(const LoraInfer<T>& p, int64_t e, int64_t f, int64_t features, Compute<T>* sums) {
  constexpr int kSize = kBlockSize<T>;
  const int64_t rank = p.ranks[e];
  int64_t j = 0;
  for (; j + kSize <= rank; j += kSize) add_columns<kSize>(p, e, j, f, features, sums);
  for (; kSize > 8 && j + 8 <= rank; j += 8) add_columns<8>(p, e, j, f, features, sums);
  for (; j + 4 <= rank; j += 4) add_columns<4>(p, e, j, f, features, sums);
  for (; j < rank; ++j) add_columns<1>(p, e, j, f, features, sums);
}

}  // namespace

template <class T>
void lora_mix(const LoraShrink<T>& p, const int64_t* tokens, int64_t begin, int64_t end) {
  const auto piece = [&](int64_t e, int64_t r, int64_t count) {
    shrink_rows(p.x, p.features, tokens + r, count, p.weight + p.ranks[e] * p.features,
                p.ranks[e + 1] - p.ranks[e], p.z + r * p.max_rank, p.max_rank);
  };
  const int64_t r = for_each_piece(p, p.features * sizeof(T), begin, end, piece);
  if (r < end) std::fill(p.z + r * p.max_rank, p.z + end * p.max_rank, T{});
}

template <class T>
void lora_mix(const LoraExpand<T>& p, const int64_t* experts, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int kSize = kBlockSize<T>, kWide = kExpandBlocks * kSize;
  const int64_t size = p.ranks[p.experts];
  alignas(64) C packed[kPackedBytes / sizeof(C)];
  for (int64_t first = begin; first < end; first += kTokenBlock) {
    const int64_t last = std::min(first + kTokenBlock, end);
    if (size * kWide > kPackedBytes / static_cast<int64_t>(sizeof(C)) ||
        (last - first) * p.slots < 2 * p.experts) {  // too much, or for too few
      int64_t f = 0;
      for (; f + kWide <= p.features; f += kWide)
        for (int64_t t = first; t < last; ++t)
          expand_tile<kExpandBlocks>(p, experts, t, f, kWide, p.weight + f, p.features);
      for (; f < p.features; f += kSize)
        for (int64_t t = first; t < last; ++t)
          expand_tile<1>(p, experts, t, f, p.features - f, p.weight + f, p.features);
      continue;
    }
    for (int64_t f = 0; f < p.features; f += kWide) {
      const int64_t columns = std::min<int64_t>(kWide, p.features - f);
      pack<kExpandBlocks, T>(
          size, columns, [&](int64_t n) { return p.weight + n * p.features + f; }, packed);
      for (int64_t t = first; t < last; ++t)
        expand_tile<kExpandBlocks>(p, experts, t, f, columns, packed, kWide);
    }
  }
}

template <class T>
void lora_mix(const LoraOuter<T>& p, const int64_t* tokens, int64_t begin, int64_t end) {
  constexpr int64_t kWide = kTileColumns * kBlockSize<T>;
  for (int64_t e = 0; e < p.experts; ++e)
    for (int64_t f = begin; f < end; f += kWide)
      for (int64_t j = 0, rank = p.ranks[e + 1] - p.ranks[e]; j < rank; j += kOuterRanks)
        outer_columns(p, tokens, e, j, std::min(kOuterRanks, rank - j), f,
                      std::min(kWide, end - f));
}

template <class T> void lora_infer_z(const LoraInfer<T>& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for_each_piece(
      p, p.in_features * sizeof(T), begin, end, [&](int64_t e, int64_t r, int64_t count) {
        T* z = p.z + r * p.max_rank;
        shrink_rows(p.x, p.in_features, p.token_of + r, count, p.a[e], p.ranks[e], z, p.max_rank);
        for (int64_t i = r; i < r + count; ++i) {
          const C gate = p.gates[p.slot_of[i]] * (p.scaling ? p.scaling[e] : C{1});
          for (int64_t j = 0; j < p.max_rank; ++j, ++z) store(z, load(*z) * gate);
        }
      });
}

template <class T>
void lora_infer_y(const LoraInfer<T>& p, Compute<T>* sums, int64_t begin, int64_t end) {
  constexpr int64_t kSize = kBlockSize<T>;
  // A block that crosses a line of the cache takes twice as long.
  while (reinterpret_cast<std::uintptr_t>(sums) % kBlockBytes != 0) ++sums;
  for (; begin < end; begin += p.kWide) {
    const int64_t width = std::min(p.kWide, end - begin);
    std::fill(sums, sums + p.tokens * p.kWide, Compute<T>{});
    for (int64_t e = 0; e < p.experts; ++e)
      for (int64_t f = 0; p.offsets[e] < p.offsets[e + 1] && f < width; f += kSize)
        add_block(p, e, begin + f, std::min(kSize, width - f), sums + f);
    T* y = p.y + begin;
    for (int64_t t = 0; t < p.tokens; ++t, y += p.features)
      for (int64_t f = 0; f < width; f += kSize) {
        const auto block = load_block(sums + t * p.kWide + f);
        if (f + kSize <= width)
          store_block(y + f, block);
        else
          store_block(y + f, block, width - f);
      }
  }
}

#define TORCH_ROUTERS_INSTANTIATE(T)                                              \
  template void lora_infer_z(const LoraInfer<T>&, int64_t, int64_t);              \
  template void lora_infer_y(const LoraInfer<T>&, Compute<T>*, int64_t, int64_t); \
  template void lora_mix(const LoraShrink<T>&, const int64_t*, int64_t, int64_t); \
  template void lora_mix(const LoraExpand<T>&, const int64_t*, int64_t, int64_t); \
  template void lora_mix(const LoraOuter<T>&, const int64_t*, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
