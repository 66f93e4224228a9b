// Kernels with one mistake each, and correct ones that look like them: what the tools must find and
// what they must not. `bugs <name>` prints "right result", "wrong result" or what a tool found.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>

#include "common/cuda.cuh"
#include "device_array.h"

namespace torch_routers {
namespace {

constexpr int kThreads = 64;
const int kUntouched = static_cast<int>(0xfefefefe);  // what DeviceArray starts with

struct Arrays {
  int *in, *out, *counter;
};

// ---- mistakes ----------------------------------------------------------------------------------

__global__ void missing_syncwarp(Arrays a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = a.in[threadIdx.x];
  a.out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void missing_syncthreads(Arrays a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = a.in[threadIdx.x];
  __syncwarp();
  a.out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void shuffle_as_barrier(Arrays a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = a.in[threadIdx.x];
  const int zero = __shfl_sync(kAllLanes, 0, 0);
  a.out[threadIdx.x] = values[threadIdx.x ^ 1] + zero;
}

__global__ void storage_used_again(Arrays a) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  int first, second;
  Scan(storage).ExclusiveSum(1, first);
  Scan(storage).ExclusiveSum(1, second);
  a.out[threadIdx.x] = first + second;
}

__global__ void divergent_barrier(Arrays a) {
  if (threadIdx.x < kWarp) {
    a.out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    a.out[threadIdx.x] = 2;
    __syncthreads();
    a.out[threadIdx.x] += 3;
  }
}

__global__ void divergent_shuffle(Arrays a) {
  int value = a.in[threadIdx.x];
  if (value % 2) value = __shfl_xor_sync(kAllLanes, value, 1);
  a.out[threadIdx.x] = value;
}

__global__ void shared_out_of_bounds(Arrays a) {
  __shared__ int values[kThreads - 1];
  values[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = values[threadIdx.x];
}

__global__ void global_out_of_bounds(Arrays a) { a.out[threadIdx.x + 1] = a.in[threadIdx.x]; }

__global__ void misaligned(Arrays a) {
  const auto pack = reinterpret_cast<const Pack<int, 2>*>(a.in + 1)[threadIdx.x / 4];
  a.out[threadIdx.x] = pack.values[0] + pack.values[1];
}

__global__ void uninitialised_shared(Arrays a) {
  __shared__ int histogram[kThreads];
  atomicAdd(&histogram[a.in[threadIdx.x]], 1);
  __syncthreads();
  a.out[threadIdx.x] = histogram[threadIdx.x];
}

__global__ void race_between_blocks(Arrays a) {
  if (threadIdx.x == 0) a.out[0] += 1;
}

__global__ void missing_fence(Arrays a) {
  if (threadIdx.x != 0) return;
  a.out[blockIdx.x] = 1;
  if (atomicAdd(a.counter, 1) == static_cast<int>(gridDim.x) - 1)
    for (unsigned i = 1; i < gridDim.x; ++i) a.out[0] += a.out[i];
}

// ---- no mistakes -------------------------------------------------------------------------------

__global__ void scan_and_reduce(Arrays a) {
  using Scan = cub::BlockScan<int, kThreads>;
  using Reduce = cub::BlockReduce<int, kThreads>;
  union Storage {
    typename Scan::TempStorage scan;
    typename Reduce::TempStorage reduce;
  };
  __shared__ Storage storage;
  extern __shared__ int sums[];
  int before, total;
  Scan(storage.scan).ExclusiveSum(a.in[threadIdx.x], before, total);
  __syncthreads();
  const int sum = Reduce(storage.reduce).Sum(a.in[threadIdx.x]);
  if (threadIdx.x == 0) sums[0] = sum;
  __syncthreads();
  a.out[threadIdx.x] = before + total - sums[0];
}

__global__ void last_block(Arrays a) {
  if (threadIdx.x != 0) return;
  a.out[blockIdx.x] = 1;
  __threadfence();
  if (atomicAdd(a.counter, 1) == static_cast<int>(gridDim.x) - 1) {
    __threadfence();
    for (unsigned i = 1; i < gridDim.x; ++i) a.out[0] += a.out[i];
  }
}

__global__ void half_warps(Arrays a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = a.in[threadIdx.x];
  __syncwarp();
  int value = values[threadIdx.x ^ 31];
  if (lane() < 16)
    value = __shfl_xor_sync(0x0000ffffu, value, 1);
  else
    value = __shfl_xor_sync(0xffff0000u, value, 1);
  a.out[threadIdx.x] = __popc(__match_any_sync(kAllLanes, value)) + value - 1;
}

// ---- the program -------------------------------------------------------------------------------

struct Bug {
  const char* name;
  void (*kernel)(Arrays);
  int blocks, dynamic_bytes;
  int (*expected)(int i);
};

const Bug kBugs[] = {
    {"missing_syncwarp", missing_syncwarp, 1, 0, [](int i) { return i ^ 1; }},
    {"missing_syncthreads", missing_syncthreads, 1, 0, [](int i) { return kThreads - 1 - i; }},
    {"shuffle_as_barrier", shuffle_as_barrier, 1, 0, [](int i) { return i ^ 1; }},
    {"storage_used_again", storage_used_again, 1, 0, [](int i) { return 2 * i; }},
    {"divergent_barrier", divergent_barrier, 1, 0, [](int i) { return i < kWarp ? 1 : 5; }},
    {"divergent_shuffle", divergent_shuffle, 1, 0, [](int i) { return i / 2 * 2; }},
    {"shared_out_of_bounds", shared_out_of_bounds, 1, 0, [](int i) { return i; }},
    {"global_out_of_bounds", global_out_of_bounds, 1, 0, [](int i) { return i ? i - 1 : -1; }},
    {"misaligned", misaligned, 1, 0, [](int i) { return i / 4 * 4 + 3; }},
    {"uninitialised_shared", uninitialised_shared, 1, 0, [](int) { return 1; }},
    {"race_between_blocks", race_between_blocks, 3, 0,
     [](int i) { return kUntouched + (i ? 0 : 3); }},
    {"missing_fence", missing_fence, 3, 0, [](int i) { return i ? i < 3 ? 1 : kUntouched : 3; }},
    {"scan_and_reduce", scan_and_reduce, 1, 4, [](int i) { return i * (i - 1) / 2; }},
    {"last_block", last_block, 3, 0, [](int i) { return i ? i < 3 ? 1 : kUntouched : 3; }},
    {"half_warps", half_warps, 1, 0, [](int i) { return i ^ 30; }},
};

int run(const Bug& bug) {
  std::vector<int> input(kThreads);
  std::iota(input.begin(), input.end(), 0);
  const DeviceArray<int> in(input), out(kThreads), counter(std::vector<int>{0});
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(bug.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bug.dynamic_bytes;
  check_cuda(
      cudaLaunchKernelEx(&config, bug.kernel, Arrays{in.data(), out.data(), counter.data()}));
  const std::vector<int> result = out.to_host();
  bool right = true;
  for (int i = 0; i < kThreads; ++i) right = right && result[i] == bug.expected(i);
  std::puts(right ? "right result" : "wrong result");
  return !right;
}

}  // namespace
}  // namespace torch_routers

int main(int, char** arguments) {
  for (const auto& bug : torch_routers::kBugs)
    if (bug.name == std::string(arguments[1])) try {
        return torch_routers::run(bug);
      } catch (const std::exception& error) {
        std::puts(error.what());
        return 2;
      }
  return 3;
}
