// One thread block per segment finds its limit and moves its rows; one block places all segments.
// Not run on a GPU yet.
//
// Here, unlike on the CPU, nobody has checked the values of the plan, of capacity and of
// group_offsets. Offsets that do not ascend within their bounds make an empty plan; of others the
// segments are disjoint, whatever the order of the rows, so that no two blocks write one element.
#include <cub/block/block_scan.cuh>

#include "common/cuda.cuh"
#include "limit_capacity/limit_capacity_kernel.h"
#include "limit_capacity/limit_capacity_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
constexpr int kThreads = kDigits;  // a thread per digit

// Whether the ends ascend from 0 to at most `most`. The answer is that of all threads of the block.
__device__ bool ascend(const int64_t* ends, int64_t count, int64_t most) {
  int wrong = ends[0] != 0 || ends[count] > most;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) wrong |= ends[i] > ends[i + 1];
  return !__syncthreads_or(wrong);
}

struct Digit {
  int value;
  unsigned before, count;
};

template <class T> __global__ void __launch_bounds__(kThreads) select_rows(CapacitySelect<T> p) {
  using Scan = cub::BlockScan<unsigned, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ unsigned counts[kDigits];  // of rows: a segment has fewer than 2^32
  __shared__ Digit chosen;
  const bool makes_sense = ascend(p.offsets, p.experts, p.rows) &&
                           (!p.group_offsets || ascend(p.group_offsets, p.groups, p.tokens));
  Segment segment = makes_sense ? segment_of(p, blockIdx.x) : Segment{};

  if (0 < segment.kept && segment.kept < segment.rows) {
    std::uint64_t* keys = p.keys + segment.first;
    // A thread reads back only the keys that it wrote.
    for (int64_t i = threadIdx.x; i < segment.rows; i += kThreads)
      keys[i] = key_of(p, segment.first + i, blockIdx.x / p.groups);
    RadixSelect select(segment.kept, key_bits(p));
    while (!select.done) {
      counts[threadIdx.x] = 0;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < segment.rows; i += kThreads)
        if (select.is_open(keys[i])) atomicAdd(&counts[select.digit(keys[i])], 1u);
      __syncthreads();
      const unsigned count = counts[threadIdx.x];
      unsigned before;
      Scan(storage).ExclusiveSum(count, before);
      if (before < select.wanted && select.wanted <= int64_t{before} + count)
        chosen = {static_cast<int>(threadIdx.x), before, count};
      __syncthreads();
      select.take(chosen.value, chosen.before, chosen.count);
    }
    segment.limit = select.limit;
    segment.ties = select.wanted;
  }
  if (threadIdx.x == 0) p.segments[blockIdx.x] = segment;
}

__global__ void __launch_bounds__(kThreads) place_segments(CapacityPlace p) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  int64_t placed = 0;
  for (int64_t first = 0; first < p.num_segments(); first += kThreads) {
    const int64_t s = first + threadIdx.x;
    int64_t before, total;
    Scan(storage).ExclusiveSum(s < p.num_segments() ? p.segments[s].kept : 0, before, total);
    if (s < p.num_segments()) p.segments[s].new_first = placed + before;
    placed += total;
    __syncthreads();
  }
  for (int64_t e = threadIdx.x; e <= p.experts; e += kThreads) {
    const auto first_of = [&](int64_t expert) {
      return expert < p.experts ? p.segments[expert * p.groups].new_first : placed;
    };
    p.new_offsets[e] = first_of(e);
    if (e < p.experts) p.new_counts[e] = first_of(e + 1) - first_of(e);
  }
  if (threadIdx.x == 0) *p.new_dropped = *p.dropped + rows_before(p, p.segments) - placed;
}

__global__ void __launch_bounds__(kThreads) move_rows(CapacityMove p) {
  // Counts of keys below the limit, and, 16 bits higher, of those equal to it.
  using Scan = cub::BlockScan<unsigned, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  const Segment segment = p.segments[blockIdx.x];
  int64_t below = 0, ties = 0;  // in the rows before this chunk
  for (int64_t first = 0; first < segment.rows; first += kThreads) {
    const int64_t i = first + threadIdx.x, row = segment.first + i;
    const bool is_row = i < segment.rows;
    int64_t place = -1;  // among the kept rows of the segment
    if (segment.kept == segment.rows) {
      place = i;
    } else if (segment.kept > 0) {
      const std::uint64_t key = is_row ? p.keys[row] : ~std::uint64_t{0};
      const bool is_below = is_row && key < segment.limit, is_tie = is_row && key == segment.limit;
      unsigned before, total;
      Scan(storage).ExclusiveSum((is_below ? 1u : 0u) | (is_tie ? 1u << 16 : 0u), before, total);
      const int64_t ties_before = ties + (before >> 16);
      if (is_below || (is_tie && ties_before < segment.ties))
        place = below + (before & 0xffffu) + min(ties_before, segment.ties);
      below += total & 0xffffu;
      ties += total >> 16;
      __syncthreads();
    }
    if (!is_row) continue;
    p.new_rows[row] = place < 0 ? -1 : segment.new_first + place;
    if (place >= 0) p.new_order[segment.new_first + place] = p.order[row];
  }
}

__global__ void __launch_bounds__(kThreads) renumber_slots(CapacityRenumber p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < p.rows && i >= rows_after(p, p.segments)) p.new_order[i] = -1;
  if (i >= p.all_slots()) return;
  const int64_t row = p.inverse[i];
  p.new_inverse[i] = 0 <= row && row < rows_before(p, p.segments) ? p.new_rows[row] : -1;
}

constexpr auto op = "limit_capacity";

}  // namespace

template <class T> void limit_capacity_cuda(const CapacitySelect<T>& p, void* stream) {
  launch(op, select_rows<T>, p.num_segments(), kThreads, stream, p);
}
void limit_capacity_cuda(const CapacityPlace& p, void* stream) {
  launch(op, place_segments, 1, kThreads, stream, p);
}
void limit_capacity_cuda(const CapacityMove& p, void* stream) {
  launch(op, move_rows, p.num_segments(), kThreads, stream, p);
}
void limit_capacity_cuda(const CapacityRenumber& p, void* stream) {
  launch(op, renumber_slots, (p.rows_or_slots() + kThreads - 1) / kThreads, kThreads, stream, p);
}

#define TORCH_ROUTERS_INSTANTIATE(T) \
  template void limit_capacity_cuda(const CapacitySelect<T>&, void*);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)

}  // namespace torch_routers
