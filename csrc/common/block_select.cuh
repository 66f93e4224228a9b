// The largest elements of a row of any length, in order, by a block of kSelectThreads threads. It is
// done on keys, unsigned integers (common/score.h: rank_key); of equal ones the lower index comes
// first. Integers are counted and compared: the result depends on no order of threads.
#pragma once

#include <cub/block/block_scan.cuh>

#include "common/cuda.cuh"

namespace torch_routers {

constexpr int kSelectThreads = 256;  // one for each value of a digit, that is of a byte

struct FoundDigit {
  std::int64_t place;  // among the elements with this digit
  int digit;
  int is_last;  // of these elements
};

struct SelectStorage {  // shared
  using Scan = cub::BlockScan<unsigned, kSelectThreads>;
  unsigned counts[kSelectThreads];
  FoundDigit found;
  unsigned size;
  typename Scan::TempStorage scan;
};

// The `place`-th largest digit, from 1. digit_of(i) is that of element i, or -1: it has none.
template <class DigitOf>
__device__ FoundDigit block_find_digit(std::int64_t size, std::int64_t place,
                                       const DigitOf& digit_of, SelectStorage& shared) {
  shared.counts[threadIdx.x] = 0;
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < size; i += kSelectThreads)
    if (const int digit = digit_of(i); digit >= 0) atomicAdd(&shared.counts[digit], 1u);
  __syncthreads();
  const unsigned digit = kSelectThreads - 1 - threadIdx.x, count = shared.counts[digit];
  unsigned above;
  SelectStorage::Scan(shared.scan).ExclusiveSum(count, above);
  if (above < place && place - above <= count)
    shared.found = {place - above, static_cast<int>(digit), place - above == count};
  __syncthreads();
  return shared.found;
}

// Which elements are the largest: those above `key`, and of those equal to it the ones up to
// `index`.
template <class Key> struct Largest {
  Key key;
  std::int64_t index;

  __device__ bool has(Key other, std::int64_t i) const {
    return other > key || (other == key && i <= index);
  }
};

// The `count` largest, 1 <= count <= size: the digits of the last of them, from the top, those of its
// key and then, where not all of the equal ones are meant, those of its index.
template <class Key, class KeyOf>
__device__ Largest<Key> block_largest(std::int64_t size, std::int64_t count, const KeyOf& key_of,
                                      SelectStorage& shared) {
  int shift = 8 * sizeof(Key) - 8, index_shift = 0;
  while (((size - 1) >> index_shift) >= 256) index_shift += 8;
  Largest<Key> last{0, size};
  std::int64_t place = count;  // of the last one, among those that have its digits so far
#pragma unroll 1
  for (bool in_key = true; shift >= 0; shift -= 8) {
    const auto digit_of = [&](std::int64_t i) {
      const Key key = key_of(i);
      if (in_key)
        return (key ^ last.key) >> shift < 256 ? static_cast<int>(key >> shift & 255) : -1;
      const bool takes_part = key == last.key && (i ^ last.index) >> shift < 256;
      return takes_part ? 255 - static_cast<int>(i >> shift & 255) : -1;  // the smallest first
    };
    const FoundDigit found = block_find_digit(size, place, digit_of, shared);
    place = found.place;
    if (in_key)
      last.key |= static_cast<Key>(found.digit) << shift;
    else
      last.index |= static_cast<std::int64_t>(255 - found.digit) << shift;
    if (in_key && found.is_last) break;  // all that have its digits
    if (in_key && shift == 0) in_key = false, shift = index_shift + 8, last.index = 0;
  }
  return last;
}

// Sorts items, largest key first. A bitonic network in which every comparison puts the better one
// first, so that what a power of two has more than `size` would never move, and need not be there.
template <class KeyOf>
__device__ void block_sort(std::int64_t* items, std::int64_t size, const KeyOf& key_of) {
  const auto next = [](std::int64_t mask, std::int64_t width) {
    return mask == width - 1 ? width / 4 : mask / 2;
  };
  for (std::int64_t width = 2; width < 2 * size; width *= 2)
    for (std::int64_t mask = width - 1; mask > 0; mask = next(mask, width)) {
      __syncthreads();
      for (std::int64_t i = threadIdx.x; i < size; i += kSelectThreads) {
        const std::int64_t j = i ^ mask;
        if (j <= i || j >= size) continue;
        const std::int64_t a = items[i], b = items[j];
        const auto key_a = key_of(a), key_b = key_of(b);
        if (key_b > key_a || (key_b == key_a && b < a)) items[i] = b, items[j] = a;
      }
    }
}

// The `count` largest, 1 <= count <= size, into `best`, in any order. No key that counts is 0.
template <class Key, class KeyOf>
__device__ void block_select(std::int64_t size, std::int64_t count, const KeyOf& key_of,
                             std::int64_t* best, SelectStorage& shared) {
  const Largest<Key> last = block_largest<Key>(size, count, key_of, shared);
  if (threadIdx.x == 0) shared.size = 0;
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < size; i += kSelectThreads)
    if (last.has(key_of(i), i)) best[atomicAdd(&shared.size, 1u)] = i;
}

}  // namespace torch_routers
