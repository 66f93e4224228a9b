#include <algorithm>

#include "common/block.h"
#include "lora_mix/lora_mix_kernel.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

// So many rows of x, or tokens of y, pass for each few rows, or columns, of the weight: both then
// stay in the caches.
constexpr int64_t kRowBlock = 32, kTokenBlock = 128;
constexpr int kExpandBlocks = kVectorBytes == 64 ? 8 : 4;

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

// y[t] for `blocks` blocks of features from f on; of the last block only `size` features.
template <int blocks, class T>
inline void expand_tile(const LoraExpand<T>& p, const int64_t* experts, int64_t t, int64_t f,
                        int64_t size) {
  using C = Compute<T>;
  constexpr int kSize = kBlockSize<T>;
  const bool whole = blocks > 1 || size == kSize;
  Block<C> sum[blocks] = {};
  for (int64_t s = 0; s < p.slots; ++s) {
    const int64_t r = p.inverse[t * p.slots + s];
    if (r < 0) continue;
    const int64_t e = experts[r], rank = p.ranks[e + 1] - p.ranks[e];
    const T* z = p.z + r * p.max_rank;
    const T* weight = p.weight + p.ranks[e] * p.features + f;
    const auto add_terms = [&](const auto& load_terms) {
      for (int64_t j = 0; j < rank; ++j) {
        const C factor = load(z[j]);
#pragma GCC unroll 8
        for (int b = 0; b < blocks; ++b) {
          const Block<C> terms = load_terms(weight + j * p.features + b * kSize);
#pragma GCC unroll 4
          for (int q = 0; q < kParts; ++q) sum[b].part[q] += factor * terms.part[q];
        }
      }
    };
    if (whole)
      add_terms([](const T* from) { return load_block(from); });
    else
      add_terms([=](const T* from) { return load_block(from, size); });
  }
  T* y = p.y + t * p.features + f;
  if (whole)
    for (int b = 0; b < blocks; ++b) store_block(y + b * kSize, sum[b]);
  else
    store_block(y, sum[0], size);
}

// result[ranks[e] + j][f] for `blocks` blocks of features from f on, and all j.
template <int blocks, class T>
void outer_tile(const LoraOuter<T>& p, const int64_t* tokens, int64_t e, int64_t f, int64_t size) {
  const int64_t first = p.offsets[e], count = p.offsets[e + 1] - first;
  const int64_t rank = p.ranks[e + 1] - p.ranks[e];
  const auto terms = [&](int64_t k) { return p.x + tokens[first + k] * p.features + f; };
  const auto tile = [&]<int rows>(int64_t j) {
    broadcast_tile<rows, blocks, T>(p.z + first * p.max_rank + j, 1, p.max_rank, terms, count,
                                    nullptr, p.result + (p.ranks[e] + j) * p.features + f,
                                    p.features, size);
  };
  int64_t j = 0;
  for (; j + kTileRows <= rank; j += kTileRows) tile.template operator()<kTileRows>(j);
  for (; j < rank; ++j) tile.template operator()<1>(j);
}

// body<blocks>(f, size) for the features [begin, end), in tiles of at most `most` blocks.
template <int most, class T, class Body>
void for_each_tile(int64_t begin, int64_t end, const Body& body) {
  constexpr int kSize = kBlockSize<T>;
  int64_t f = begin;
  for (; f + most * kSize <= end; f += most * kSize) body.template operator()<most>(f, kSize);
  for (; f < end; f += kSize) body.template operator()<1>(f, std::min<int64_t>(kSize, end - f));
}

}  // namespace

template <class T>
void lora_mix(const LoraShrink<T>& p, const int64_t* tokens, int64_t begin, int64_t end) {
  const int64_t* past = std::upper_bound(p.offsets, p.offsets + p.experts + 1, begin);
  int64_t r = begin;
  for (int64_t e = past - p.offsets - 1; e < p.experts && r < end; ++e)
    for (const int64_t last = std::min(end, p.offsets[e + 1]); r < last;) {
      const int64_t count = std::min(kRowBlock, last - r);
      shrink_rows(p, tokens, e, r, count);
      r += count;
    }
  if (r < end) std::fill(p.z + r * p.max_rank, p.z + end * p.max_rank, T{});
}

template <class T>
void lora_mix(const LoraExpand<T>& p, const int64_t* experts, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kTokenBlock) {
    const int64_t last = std::min(first + kTokenBlock, end);
    for_each_tile<kExpandBlocks, T>(0, p.features, [&]<int blocks>(int64_t f, int64_t size) {
      for (int64_t t = first; t < last; ++t) expand_tile<blocks>(p, experts, t, f, size);
    });
  }
}

template <class T>
void lora_mix(const LoraOuter<T>& p, const int64_t* tokens, int64_t begin, int64_t end) {
  for (int64_t e = 0; e < p.experts; ++e)
    for_each_tile<kTileColumns, T>(begin, end, [&]<int blocks>(int64_t f, int64_t size) {
      outer_tile<blocks>(p, tokens, e, f, size);
    });
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
