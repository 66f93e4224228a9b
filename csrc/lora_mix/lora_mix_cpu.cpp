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

// z[r][j] for the `count` rows from r on, which are of expert e.
template <class T>
void shrink_rows(const LoraShrink<T>& p, const int64_t* tokens, int64_t e, int64_t r,
                 int64_t count) {
  const int64_t rank = p.ranks[e + 1] - p.ranks[e];
  const T* weight = p.weight + p.ranks[e] * p.features;
  const auto column = [&]<int columns>(int64_t j) {
    const auto tile = [&]<int tile_rows>(int64_t i) {
      const T* rows[tile_rows];
      for (int n = 0; n < tile_rows; ++n) rows[n] = p.x + tokens[r + i + n] * p.features;
      dot_tile<tile_rows, columns, T>(rows, weight + j * p.features, p.features, p.features,
                                      nullptr, p.z + (r + i) * p.max_rank + j, p.max_rank);
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
  for (int64_t i = r; i < r + count; ++i)
    std::fill(p.z + i * p.max_rank + rank, p.z + (i + 1) * p.max_rank, T{});
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

}  // namespace

template <class T>
void lora_mix(const LoraShrink<T>& p, const int64_t* tokens, int64_t begin, int64_t end) {
  const int64_t* past = std::upper_bound(p.offsets, p.offsets + p.experts + 1, begin);
  const int64_t fit =
      kRowBytes / (static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(1, p.features));
  const int64_t block = std::max<int64_t>(fit, kTileRows);
  int64_t r = begin;
  for (int64_t e = past - p.offsets - 1; e < p.experts && r < end; ++e)
    for (const int64_t last = std::min(end, p.offsets[e + 1]); r < last;) {
      const int64_t count = std::min(block, last - r);
      shrink_rows(p, tokens, e, r, count);
      r += count;
    }
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

#define TORCH_ROUTERS_INSTANTIATE(T)                                                 \
  template void lora_mix(const LoraShrink<T>&, const int64_t*, int64_t, int64_t); \
  template void lora_mix(const LoraExpand<T>&, const int64_t*, int64_t, int64_t); \
  template void lora_mix(const LoraOuter<T>&, const int64_t*, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
