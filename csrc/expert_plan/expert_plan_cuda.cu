// A warp per part of the slots: it counts its slots of each expert, a block per expert adds up the
// counts of the parts before each, one block those of the experts before each, and then each warp
// places its slots, 32 at a time, in their order. No atomics: of the lanes with one expert the first
// writes for all, and a lane's place among them is how many of them are before it.
// Not run on a GPU yet.
#include <cub/block/block_scan.cuh>

#include "common/cuda.cuh"
#include "expert_plan/expert_plan_kernel.h"
#include "expert_plan/expert_plan_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kScanThreads = 256;
constexpr int kMostExperts = 4096;  // that a warp counts; where there are more, several warps do

// As many warps as 32 KiB of shared memory hold a row number per expert for.
template <int kExperts> constexpr int kWarps = kExperts > 512 ? 4096 / kExperts : 8;

// The experts [first, first + width) of the slots [begin, end) are a warp's.
struct Task {
  int64_t part, begin, end, first;
  int width;
};
template <int kExperts> __host__ __device__ int64_t blocks_per_chunk(const ExpertPlanRows& p) {
  return (p.parts + kWarps<kExperts> - 1) / kWarps<kExperts>;
}
template <int kExperts> __device__ Task task_of_warp(const ExpertPlanRows& p, int64_t part_size) {
  const int64_t chunk = blockIdx.x / blocks_per_chunk<kExperts>(p);
  const int64_t block = blockIdx.x % blocks_per_chunk<kExperts>(p);
  Task task;
  task.part = block * kWarps<kExperts> + warp();
  task.begin = task.part * part_size;
  task.end = min(task.begin + part_size, p.tokens * p.slots);
  task.first = chunk * kExperts;
  task.width = static_cast<int>(min(p.experts - task.first, int64_t{kExperts}));
  return task;
}

// The expert of slot begin + i, or -1; `column` is that of slot `begin`.
__device__ int64_t expert_of(const ExpertPlan<int64_t>& p, int64_t begin, unsigned i, unsigned) {
  const int64_t expert = p.experts_of[begin + i];
  return 0 <= expert && expert < p.experts ? expert : -1;
}
template <class T>
__device__ int64_t expert_of(const ExpertPlan<T>& p, int64_t begin, unsigned i, unsigned column) {
  const bool live = is_live(p.experts_of[begin + i]);
  return live ? int64_t{(column + i) % static_cast<unsigned>(p.experts)} : -1;
}

// visit(slot, its expert or -1, that without the task's first expert or -1, lanes of the same expert)
// for 32 slots at a time; the slot of a lane beyond the end is -1.
template <class T, class Visit>
__device__ void visit_slots(const ExpertPlan<T>& p, const Task& task, const Visit& visit) {
  const auto size = static_cast<unsigned>(task.end - task.begin);
  const auto column = static_cast<unsigned>(task.begin % p.experts);
  for (unsigned first = 0; first < size; first += kWarp) {
    const unsigned i = first + lane();
    const int64_t expert = i < size ? expert_of(p, task.begin, i, column) : -1;
    const int64_t place = expert - task.first;
    const int own = 0 <= place && place < task.width ? static_cast<int>(place) : -1;
    visit(i < size ? task.begin + i : -1, expert, own, __match_any_sync(kAllLanes, own));
  }
}

__device__ int lanes_before(unsigned lanes) { return __popc(lanes & ((1u << lane()) - 1)); }

// ---- the four steps ----------------------------------------------------------------------------

template <class T> struct Parts : ExpertPlan<T> {
  int64_t part_size;
};

template <class T, int kExperts>
__global__ void __launch_bounds__(kWarps<kExperts>* kWarp) count_slots(Parts<T> p) {
  __shared__ int all_counts[kWarps<kExperts>][kExperts];
  const Task task = task_of_warp<kExperts>(p, p.part_size);
  if (task.part >= p.parts) return;
  int* counts = all_counts[warp()];
  for (int e = lane(); e < task.width; e += kWarp) counts[e] = 0;
  __syncwarp();
  visit_slots(p, task, [&](int64_t, int64_t, int own, unsigned same) {
    if (own >= 0 && lanes_before(same) == 0) counts[own] += __popc(same);
    __syncwarp();
  });
  for (int e = lane(); e < task.width; e += kWarp)
    p.bins[(task.first + e) * p.parts + task.part] = counts[e];
}

// From the counts of each part to those of the parts before it, and all of an expert.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) scan_parts(ExpertPlanRows p) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  int64_t* bins = p.bins + blockIdx.x * p.parts;
  int64_t before = 0;
  for (int64_t first = 0; first < p.parts; first += kThreads) {
    const int64_t part = first + threadIdx.x;
    int64_t count = part < p.parts ? bins[part] : 0, sum, total;
    Scan(storage).ExclusiveSum(count, sum, total);
    if (part < p.parts) bins[part] = before + sum;
    before += total;
    __syncthreads();  // storage is used again
  }
  if (threadIdx.x == 0) p.counts[blockIdx.x] = before;
}

__global__ void __launch_bounds__(kScanThreads) scan_experts(ExpertPlanRows p) {
  using Scan = cub::BlockScan<int64_t, kScanThreads>;
  __shared__ typename Scan::TempStorage storage;
  int64_t before = 0;
  for (int64_t first = 0; first < p.experts; first += kScanThreads) {
    const int64_t e = first + threadIdx.x;
    int64_t count = e < p.experts ? p.counts[e] : 0, sum, total;
    Scan(storage).ExclusiveSum(count, sum, total);
    if (e < p.experts) {
      p.offsets[e] = min(before + sum, p.max_rows);
      p.counts[e] = min(before + sum + count, p.max_rows) - p.offsets[e];
    }
    before += total;
    __syncthreads();  // storage is used again
  }
  if (threadIdx.x != 0) return;
  p.offsets[p.experts] = min(before, p.max_rows);
  *p.dropped = before - p.offsets[p.experts];
}

template <class T, int kExperts>
__global__ void __launch_bounds__(kWarps<kExperts>* kWarp) place_slots(Parts<T> p) {
  __shared__ int64_t all_next[kWarps<kExperts>][kExperts];
  constexpr int kThreads = kWarps<kExperts> * kWarp;
  for (int64_t row = p.offsets[p.experts] + int64_t{blockIdx.x} * kThreads + threadIdx.x;
       row < p.max_rows; row += int64_t{gridDim.x} * kThreads)
    p.order[row] = -1;

  const Task task = task_of_warp<kExperts>(p, p.part_size);
  if (task.part >= p.parts) return;
  int64_t* next = all_next[warp()];
  for (int e = lane(); e < task.width; e += kWarp)
    next[e] = p.offsets[task.first + e] + p.bins[(task.first + e) * p.parts + task.part];
  __syncwarp();
  visit_slots(p, task, [&](int64_t slot, int64_t expert, int own, unsigned same) {
    const int rank = lanes_before(same);
    const int64_t first = own >= 0 ? next[own] : 0, row = first + rank;
    __syncwarp();  // all have read
    if (own >= 0 && rank == 0) next[own] = first + __popc(same);
    __syncwarp();
    if (own >= 0) {
      if (row < p.max_rows) p.order[row] = slot;
      p.inverse[slot] = row < p.max_rows ? row : -1;
    } else if (slot >= 0 && expert == -1 && task.first == 0) {
      p.inverse[slot] = -1;
    }
  });
}

// ---- launching ---------------------------------------------------------------------------------

template <int kExperts, class T> void run(const Parts<T>& p, void* stream) {
  constexpr auto op = "expert_plan";
  constexpr int kThreads = kWarps<kExperts> * kWarp;
  const ExpertPlanRows rows = p;
  const int64_t blocks = blocks_per_chunk<kExperts>(p) * ((p.experts + kExperts - 1) / kExperts);
  launch(op, count_slots<T, kExperts>, blocks, kThreads, stream, p);
  if (p.parts <= 4 * kWarp)
    launch(op, scan_parts<kWarp>, p.experts, kWarp, stream, rows);
  else
    launch(op, scan_parts<kScanThreads>, p.experts, kScanThreads, stream, rows);
  launch(op, scan_experts, 1, kScanThreads, stream, rows);
  launch(op, place_slots<T, kExperts>, blocks, kThreads, stream, p);
}

}  // namespace

template <class T> void expert_plan_cuda(const ExpertPlan<T>& plan, void* stream) {
  const Parts<T> p{plan, plan.cuda_part_size()};
  if (p.experts <= 256) return run<256>(p, stream);
  if (p.experts <= 1024) return run<1024>(p, stream);
  run<kMostExperts>(p, stream);
}

template void expert_plan_cuda(const ExpertPlan<int64_t>&, void*);
template void expert_plan_cuda(const ExpertPlan<float>&, void*);
template void expert_plan_cuda(const ExpertPlan<double>&, void*);
template void expert_plan_cuda(const ExpertPlan<BFloat16>&, void*);
template void expert_plan_cuda(const ExpertPlan<Float16>&, void*);

}  // namespace torch_routers
