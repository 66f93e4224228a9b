// What the CUDA kernels share: launching, collectives of a warp, rows held in registers.
// Collectives of a block or of the whole device are CUB's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/score.h"

namespace torch_routers {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Queues kernel(arguments...) on `stream`; a launch that fails throws, with the name of the op.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), std::int64_t blocks, int threads,
            void* stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = blocks > INT32_MAX ? cudaErrorInvalidConfiguration
                                               : cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) +
                             ": CUDA launch failed: " + cudaGetErrorString(error));
}

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// The results are in every lane. A butterfly: the same bits in every lane and in every run.
template <class T> __device__ inline T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Of values none of which is NaN.
template <class T> __device__ inline T warp_max(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

__device__ inline std::uint32_t warp_min(std::uint32_t value) {
  return __reduce_min_sync(kAllLanes, value);
}
__device__ inline std::uint32_t warp_max(std::uint32_t value) {
  return __reduce_max_sync(kAllLanes, value);
}
// The largest upper half, then the largest lower half of the lanes that have it.
__device__ inline std::uint64_t warp_max(std::uint64_t value) {
  const auto mine = static_cast<std::uint32_t>(value >> 32);
  const std::uint32_t upper = warp_max(mine);
  const std::uint32_t lower = warp_max(mine == upper ? static_cast<std::uint32_t>(value) : 0u);
  return (std::uint64_t{upper} << 32) | lower;
}

// Of the lanes with one key the first gets the sum of their values, in the order of lanes, and the
// result true. Lanes with a negative key take no part.
template <class T> __device__ inline bool warp_add_duplicates(std::int64_t key, T& value) {
  const unsigned same = __match_any_sync(kAllLanes, key);
  const bool first = lane() == __ffs(same) - 1;
  if (__any_sync(kAllLanes, key >= 0 && !first))
    for (int l = 1; l < kWarp; ++l) {
      const T other = __shfl_sync(kAllLanes, value, l);
      if (first && l != lane() && (same >> l & 1)) value += other;
    }
  return first && key >= 0;
}

// Neighbours that one instruction moves.
template <class T, int kSize> struct alignas(kSize * sizeof(T)) Pack {
  T values[kSize];
};
template <class T> constexpr int kWidest = 16 / sizeof(T);  // of the widest instruction

template <int kPack, class T> __device__ Pack<T, kPack> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kPack>*>(from);
}
template <int kPack, class T> __device__ void store_pack(T* to, const Pack<T, kPack>& pack) {
  *reinterpret_cast<Pack<T, kPack>*>(to) = pack;
}

// Whether packs of kWidest<T> move all rows of `size` elements of these arrays.
template <class T>
bool is_aligned(std::int64_t size, std::initializer_list<const T*> arrays) {
  bool result = size % kWidest<T> == 0;
  for (const T* array : arrays)
    result = result && reinterpret_cast<std::uintptr_t>(array) % 16 == 0;
  return result;
}

// A row of at most kWarp * kPerLane elements in the registers of a warp, as numbers of Compute<S>;
// in memory they are of S, or those of a row beside it of Compute<S>. Each lane holds packs of
// neighbours; a row that starts at a multiple of a pack is moved by packs, any other by elements.
template <class S, int kPerLane> struct WarpRow {
  using C = Compute<S>;
  static constexpr int kSize = kWarp * kPerLane;
  static constexpr int kPack = kPerLane * sizeof(S) < 16 ? kPerLane : 16 / sizeof(S);
  template <class T> using Move = Pack<T, kPack * sizeof(T) <= 16 ? kPack : 16 / sizeof(T)>;
  C values[kPerLane];

  // Where in the row values[i] of this lane belongs: first() + offset(i), increasing in i.
  static __device__ int first() { return lane() * kPack; }
  static __host__ __device__ constexpr int offset(int i) {
    return i / kPack * kPack * kWarp + i % kPack;
  }

  template <class T> static __device__ bool by_packs(const T* row, int size) {
    return reinterpret_cast<std::uintptr_t>(row) % sizeof(Move<T>) == 0 &&
           size % static_cast<int>(sizeof(Move<T>) / sizeof(T)) == 0;
  }

  // Addresses and bounds are those of values[0] and constants: an array of them would be held in
  // registers where rows are loaded in a loop.
  template <class Element> static __device__ Element* own(Element* row) { return row + first(); }
  static __device__ bool has(int i, int size) { return offset(i) < size - first(); }

  __device__ void fill(C value) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = value;
  }

  // The elements past `size` become `beyond`.
  template <class T> __device__ void load(const T* row, int size, C beyond) {
    constexpr int kMoved = sizeof(Move<T>) / sizeof(T);
    fill(beyond);
    if (by_packs(row, size)) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += kMoved)
        if (has(i, size)) {
          const auto pack = *reinterpret_cast<const Move<T>*>(own(row) + offset(i));
#pragma unroll
          for (int j = 0; j < kMoved; ++j) values[i + j] = torch_routers::load(pack.values[j]);
        }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (has(i, size)) values[i] = torch_routers::load(own(row)[offset(i)]);
    }
  }

  template <class T> __device__ void store(T* row, int size) const {
    constexpr int kMoved = sizeof(Move<T>) / sizeof(T);
    if (by_packs(row, size)) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += kMoved)
        if (has(i, size)) {
          Move<T> pack;
#pragma unroll
          for (int j = 0; j < kMoved; ++j) torch_routers::store(&pack.values[j], values[i + j]);
          *reinterpret_cast<Move<T>*>(own(row) + offset(i)) = pack;
        }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (has(i, size)) torch_routers::store(own(row) + offset(i), values[i]);
    }
  }
};

// In lane j < count the element of the j-th largest key of a row, in the others -1. Of equal keys
// the lower element comes first. The key 0 stands for none; at least `count` are not 0.
template <class Row, class Key, int kPerLane>
__device__ int warp_select(Key (&keys)[kPerLane], int count) {
  Key largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = max(largest, keys[i]);
  int selected = -1;
  for (int j = 0; j < count; ++j) {
    largest = warp_max(largest);
    int mine = -1;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i)
      if (keys[i] == largest) mine = Row::offset(i);
    const int best = static_cast<int>(warp_min(mine < 0 ? ~0u : Row::first() + mine));
    if (lane() == j) selected = best;
    largest = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (Row::offset(i) == best - Row::first()) keys[i] = 0;
      largest = max(largest, keys[i]);
    }
  }
  return selected;
}

}  // namespace torch_routers
