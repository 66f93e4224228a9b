// shrink: a block takes a tile of rows of one expert and of its ranks; lanes share the features.
// expand: a warp takes a token, lanes share a chunk of the features. outer: a block takes an
// expert, a tile of its ranks and a chunk of the features; its warps take batches of rows in turn,
// and their sums are added in the order of warps. Where rows begin at multiples of 16 bytes packs
// are moved, else elements. Not run on a GPU yet.
//
// Nobody has checked the values of order, inverse and offsets. A row without a possible slot has no
// token, a slot without a possible row adds nothing; the first offset counts as 0, the others as
// numbers in [0, rows].
#include "common/cuda.cuh"
#include "lora_mix/lora_mix_kernel.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
template <class T> constexpr int kRanks = 64 / sizeof(Compute<T>);  // of a tile
template <int kPack> constexpr int kChunk = kWarp * kPack;          // of features

__host__ __device__ int64_t blocks_of(int64_t count, int64_t per_block) {
  return (count + per_block - 1) / per_block;
}

// ---- the plan ----------------------------------------------------------------------------------

__device__ int64_t first_row(const LoraRows& p, int64_t expert) {
  const int64_t row = expert == 0 ? 0 : p.offsets[expert];
  return row < 0 ? 0 : min(row, p.rows);
}

// The last expert for which `reached` is true, as it is for those before it; p.experts stands for
// what is behind them all.
template <class Reached> __device__ int64_t last_expert(const LoraRows& p, const Reached& reached) {
  int64_t low = 0, high = p.experts;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (reached(middle))
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ int64_t rank_of(const LoraRows& p, int64_t expert) {
  return expert == p.experts ? 0 : min(p.ranks[expert + 1] - p.ranks[expert], p.max_rank);
}
// How many of an expert's ranks from `first` on are in a tile.
template <class T>
__device__ int ranks_in_tile(const LoraRows& p, int64_t expert, int64_t first) {
  return static_cast<int>(min(rank_of(p, expert) - first, int64_t{kRanks<T>}));
}

// -1 if there is none.
__device__ int64_t token_of(const LoraRows& p, int64_t row) {
  const int64_t slot = p.order[row];
  return 0 <= slot && slot < p.tokens * p.slots ? slot / p.slots : -1;
}

// ---- packs as numbers --------------------------------------------------------------------------

template <class T, int kPack> using Numbers = Pack<Compute<T>, kPack>;

template <int kPack, class T> __device__ Numbers<T, kPack> load_numbers(const T* from) {
  const auto pack = load_pack<kPack>(from);
  Numbers<T, kPack> result;
#pragma unroll
  for (int i = 0; i < kPack; ++i) result.values[i] = load(pack.values[i]);
  return result;
}
template <int kPack, class T> __device__ Numbers<T, kPack> load_or_zeros(bool is_there,
                                                                         const T* from) {
  return is_there ? load_numbers<kPack>(from) : Numbers<T, kPack>{};
}

template <class T, int kPack>
__device__ void store_numbers(T* to, const Numbers<T, kPack>& numbers) {
  Pack<T, kPack> pack;
#pragma unroll
  for (int i = 0; i < kPack; ++i) store(&pack.values[i], numbers.values[i]);
  store_pack(to, pack);
}

// Where in a row the pack of this lane begins. (Of 32 bits: nvcc then sees that it is aligned.)
template <int kPack> __device__ int64_t own_pack(int64_t chunk) {
  return int64_t{static_cast<unsigned>(chunk) * kWarp + lane()} * kPack;
}

// ---- shrink ------------------------------------------------------------------------------------

constexpr int kRowsOfWarp = 4, kRowsOfTile = kWarps * kRowsOfWarp;

// The number of the first tile of an expert. There are numbers enough for all of its rows, and for
// those behind the last expert's; some tiles are empty.
__device__ int64_t first_tile(const LoraRows& p, int64_t expert) {
  return first_row(p, expert) / kRowsOfTile + expert;
}
int64_t tiles_of(const LoraRows& p) { return p.rows / kRowsOfTile + p.experts + 1; }

// Each value summed over the lanes: lane l gets the sums of values [l, l + 1) * kSize / kWarp, in
// the first places.
template <int kSize, class C> __device__ void sum_over_lanes(C (&values)[kSize]) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int half = kSize / 2 / step, distance = kWarp / 2 / step;
    const bool upper = lane() & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const C low = values[i], high = values[half + i];
      values[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, distance);
    }
  }
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2) shrink(LoraShrink<T> p) {
  __shared__ alignas(16) Numbers<T, kPack> weights[2][kRanks<T>][kWarp];

  const int64_t rank_tiles = blocks_of(p.max_rank, kRanks<T>);
  const int64_t tile = blockIdx.x / rank_tiles, first_rank = blockIdx.x % rank_tiles * kRanks<T>;
  const int64_t expert = last_expert(p, [&](int64_t e) { return first_tile(p, e) <= tile; });
  const int64_t begin = first_row(p, expert) + (tile - first_tile(p, expert)) * kRowsOfTile;
  const int64_t end = expert == p.experts ? p.rows : first_row(p, expert + 1);
  if (begin >= end) return;
  const auto row_of = [&](int i) { return begin + i * kWarps + warp(); };

  const int ranks = ranks_in_tile<T>(p, expert, first_rank);
  const T* weight = p.weight + (p.ranks[expert] + first_rank) * p.features;
  const T* token_rows[kRowsOfWarp];  // without a token, one that can be read
#pragma unroll
  for (int i = 0; i < kRowsOfWarp; ++i) {
    const int64_t token = row_of(i) < end ? token_of(p, row_of(i)) : -1;
    token_rows[i] = token < 0 ? weight : p.x + token * p.features;
  }

  Compute<T> sums[kRowsOfWarp * kRanks<T>] = {};
  const int64_t features = ranks > 0 ? p.features : 0;
  const int ranks_of_warp = row_of(0) < end ? ranks : 0;  // without rows it loads weights only
  int turn = 0;  // the two halves of `weights` are used in turn
  for (int64_t first = 0; first < features; first += kChunk<kPack>, turn ^= 1) {
    const int64_t h = first + lane() * kPack;
    Numbers<T, kPack> x[kRowsOfWarp];
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i)
      x[i] = load_or_zeros<kPack>(h < features, token_rows[i] + h);
    for (int j = warp(); j < ranks; j += kWarps)
      weights[turn][j][lane()] = load_or_zeros<kPack>(h < features, weight + j * p.features + h);
    __syncthreads();  // the weights are there, and nobody reads the other half any more
#pragma unroll
    for (int j = 0; j < kRanks<T>; ++j)
      if (j < ranks_of_warp) {
        const auto w = weights[turn][j][lane()];
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i)
#pragma unroll
          for (int k = 0; k < kPack; ++k) sums[i * kRanks<T> + j] += x[i].values[k] * w.values[k];
      }
  }
  sum_over_lanes(sums);

  constexpr int kOwn = kRowsOfWarp * kRanks<T> / kWarp;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int place = lane() * kOwn + i;
    const int64_t row = row_of(place / kRanks<T>);
    const int64_t j = first_rank + place % kRanks<T>;
    if (row < end && j < p.max_rank)
      store(p.z + row * p.max_rank + j, token_of(p, row) < 0 ? 0 : sums[i]);
  }
}

// ---- expand ------------------------------------------------------------------------------------

constexpr int kTokens = 64;  // of a block: its warps find the weights in the cache

template <class T, int kPack> __global__ void __launch_bounds__(kThreads, 4)
    expand(LoraExpand<T> p) {
  const int64_t chunks = blocks_of(p.features, kChunk<kPack>);
  const int64_t first_token = blockIdx.x / chunks * kTokens;
  const int64_t own = own_pack<kPack>(blockIdx.x % chunks);
  const int64_t h = min(own, p.features - kPack);  // past the end as before it, but not written
  for (int64_t token = first_token + warp(); token < min(first_token + kTokens, p.tokens);
       token += kWarps) {
    Numbers<T, kPack> sums{};
    for (int64_t first = 0; first < p.slots; first += kWarp) {
      // Each lane looks up a slot.
      const int64_t slot = first + lane();
      const int64_t own_row = slot < p.slots ? p.inverse[token * p.slots + slot] : -1;
      int64_t own_rank = 0, own_weight = 0;
      if (0 <= own_row && own_row < p.rows) {
        const int64_t expert =
            last_expert(p, [&](int64_t e) { return first_row(p, e) <= own_row; });
        own_rank = rank_of(p, expert);
        own_weight = p.ranks[expert];
      }
      for (unsigned left = __ballot_sync(kAllLanes, own_rank > 0); left; left &= left - 1) {
        const int from = __ffs(static_cast<int>(left)) - 1;
        const int64_t rank = __shfl_sync(kAllLanes, own_rank, from);
        const T* weight = p.weight + __shfl_sync(kAllLanes, own_weight, from) * p.features + h;
        const T* z = p.z + __shfl_sync(kAllLanes, own_row, from) * p.max_rank;
        for (int64_t j = 0; j < rank; j += kWarp) {
          const int count = static_cast<int>(min(rank - j, int64_t{kWarp}));
          const Compute<T> own_z = lane() < count ? load(z[j + lane()]) : 0;
#pragma unroll 4
          for (int l = 0; l < count; ++l, weight += p.features) {
            const auto w = load_numbers<kPack>(weight);
            const Compute<T> factor = __shfl_sync(kAllLanes, own_z, l);
#pragma unroll
            for (int i = 0; i < kPack; ++i) sums.values[i] += factor * w.values[i];
          }
        }
      }
    }
    if (own < p.features) store_numbers(p.y + token * p.features + own, sums);
  }
}

// ---- outer -------------------------------------------------------------------------------------

constexpr int kBatch = 16;  // rows of a turn

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2) outer(LoraOuter<T> p) {
  using C = Compute<T>;
  __shared__ alignas(16) C all_z[kWarps][kBatch][kRanks<T>];
  __shared__ alignas(16) Pack<C, kPack> totals[kRanks<T>][kWarp];

  const int64_t chunks = blocks_of(p.features, kChunk<kPack>);
  const int64_t rank_tiles = blocks_of(p.max_rank, kRanks<T>);
  const int64_t h = own_pack<kPack>(blockIdx.x % chunks);
  const int64_t first_rank = blockIdx.x / chunks % rank_tiles * kRanks<T>;
  const int64_t expert = blockIdx.x / chunks / rank_tiles;
  const int ranks = ranks_in_tile<T>(p, expert, first_rank);
  if (ranks <= 0) return;

  Numbers<T, kPack> sums[kRanks<T>] = {};
  auto& z = all_z[warp()];
  const int64_t end = first_row(p, expert + 1);
  for (int64_t begin = first_row(p, expert) + warp() * kBatch; begin < end;
       begin += kWarps * kBatch) {
    const int count = static_cast<int>(min(end - begin, int64_t{kBatch}));
    const int64_t own_token = lane() < count ? token_of(p, begin + lane()) : -1;
    __syncwarp();  // the last batch was read
#pragma unroll
    for (int place = lane(); place < kBatch * kRanks<T>; place += kWarp) {
      const int row = place / kRanks<T>, j = place % kRanks<T>;
      const bool counts = __shfl_sync(kAllLanes, own_token, row) >= 0 && j < ranks;
      z[row][j] = counts ? load(p.z[(begin + row) * p.max_rank + first_rank + j]) : 0;
    }
    __syncwarp();  // z is there
#pragma unroll 4
    for (int row = 0; row < count; ++row) {
      const int64_t token = __shfl_sync(kAllLanes, own_token, row);
      const auto x =
          load_or_zeros<kPack>(token >= 0 && h < p.features, p.x + token * p.features + h);
      constexpr int kStep = kWidest<C>;  // of z at a time
#pragma unroll
      for (int first = 0; first < kRanks<T>; first += kStep)
        if (first < ranks) {
          const auto factors = load_pack<kStep>(&z[row][first]);
#pragma unroll
          for (int j = 0; j < kStep; ++j)
#pragma unroll
            for (int i = 0; i < kPack; ++i)
              sums[first + j].values[i] += factors.values[j] * x.values[i];
        }
    }
  }

  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp() == turn)
#pragma unroll
      for (int j = 0; j < kRanks<T>; ++j) {
        Numbers<T, kPack> total = turn ? totals[j][lane()] : Numbers<T, kPack>{};
#pragma unroll
        for (int i = 0; i < kPack; ++i) total.values[i] += sums[j].values[i];
        totals[j][lane()] = total;
      }
    __syncthreads();
  }
  for (int j = warp(); j < ranks && h < p.features; j += kWarps)
    store_numbers(p.result + (p.ranks[expert] + first_rank + j) * p.features + h,
                  totals[j][lane()]);
}

}  // namespace

// ---- launching ---------------------------------------------------------------------------------

template <class T> void lora_mix_cuda(const LoraShrink<T>& p, void* stream) {
  const bool wide = is_aligned<T>(p.features, {p.x, p.weight});
  launch("lora_mix", wide ? shrink<T, kWidest<Compute<T>>> : shrink<T, 1>,
         tiles_of(p) * blocks_of(p.max_rank, kRanks<T>), kThreads, stream, p);
}

template <class T> void lora_mix_cuda(const LoraExpand<T>& p, void* stream) {
  const bool wide = is_aligned<T>(p.features, {p.weight, p.y});
  const int64_t chunks = blocks_of(p.features, kWarp * (wide ? kWidest<T> : 1));
  launch("lora_mix", wide ? expand<T, kWidest<T>> : expand<T, 1>,
         blocks_of(p.tokens, kTokens) * chunks, kThreads, stream, p);
}

template <class T> void lora_mix_cuda(const LoraOuter<T>& p, void* stream) {
  constexpr int kPack = kWidest<Compute<T>>;
  const bool wide = is_aligned<T>(p.features, {p.x, p.result});
  const int64_t chunks = blocks_of(p.features, kWarp * (wide ? kPack : 1));
  launch("lora_mix", wide ? outer<T, kPack> : outer<T, 1>,
         p.experts * blocks_of(p.max_rank, kRanks<T>) * chunks, kThreads, stream, p);
}

#define TORCH_ROUTERS_INSTANTIATE(T)                          \
  template void lora_mix_cuda(const LoraShrink<T>&, void*); \
  template void lora_mix_cuda(const LoraExpand<T>&, void*); \
  template void lora_mix_cuda(const LoraOuter<T>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)

}  // namespace torch_routers
