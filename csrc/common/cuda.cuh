// What the CUDA kernels share: launching, collectives of a warp, rows held in registers.
// Collectives of a block or of the whole device are CUB's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

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

// NaN is passed over.
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

// Neighbours that one instruction moves.
template <class T, int kSize> struct alignas(kSize * sizeof(T)) Pack {
  T values[kSize];
};

// A row of at most kWarp * kPerLane elements in the registers of a warp. Each lane holds packs of
// neighbours; a row that starts at a multiple of a pack is moved by packs, any other by elements.
template <class T, int kPerLane> struct WarpRow {
  static constexpr int kSize = kWarp * kPerLane;
  static constexpr int kPack = kPerLane * sizeof(T) < 16 ? kPerLane : 16 / sizeof(T);
  T values[kPerLane];

  // Where in the row values[i] of this lane belongs: first() + offset(i), increasing in i.
  static __device__ int first() { return lane() * kPack; }
  static __host__ __device__ constexpr int offset(int i) {
    return i / kPack * kPack * kWarp + i % kPack;
  }
  static __device__ int element(int i) { return first() + offset(i); }

  static __device__ bool by_packs(const T* row, int size) {
    return reinterpret_cast<std::uintptr_t>(row) % sizeof(Pack<T, kPack>) == 0 && size % kPack == 0;
  }

  __device__ void fill(T value) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = value;
  }

  // The elements past `size` become `beyond`.
  __device__ void load(const T* row, int size, T beyond) {
    fill(beyond);
    if (by_packs(row, size)) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += kPack)
        if (element(i) < size) {
          const auto pack = *reinterpret_cast<const Pack<T, kPack>*>(row + element(i));
#pragma unroll
          for (int j = 0; j < kPack; ++j) values[i + j] = pack.values[j];
        }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (element(i) < size) values[i] = row[element(i)];
    }
  }

  __device__ void store(T* row, int size) const {
    if (by_packs(row, size)) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += kPack)
        if (element(i) < size) {
          Pack<T, kPack> pack;
#pragma unroll
          for (int j = 0; j < kPack; ++j) pack.values[j] = values[i + j];
          *reinterpret_cast<Pack<T, kPack>*>(row + element(i)) = pack;
        }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (element(i) < size) row[element(i)] = values[i];
    }
  }
};

}  // namespace torch_routers
