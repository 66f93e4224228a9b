// The largest of a row, in order, on the CPU. It is done on keys: integers that order like the
// values they stand for (common/score.h); of equal ones the lower index comes first.
#pragma once

#include <climits>
#include <cstdint>

#include "common/score.h"
#include "common/vector.h"

namespace torch_routers {

// The key of no value: the smallest integer.
template <class Key> constexpr Key kNone = Key(std::uint64_t{1} << (8 * sizeof(Key) - 1));
template <class T> constexpr SignedBits<T> kNoKey = kNone<SignedBits<T>>;

// rank_key as a signed integer, the only kind that every instruction set compares.
template <class T> static inline SignedBits<T> signed_key(T value) {
  return static_cast<SignedBits<T>>(rank_key(value) ^ static_cast<Bits<T>>(kNoKey<T>));
}

// A row of keys is followed by space for so many more, which `select_keys` fills.
constexpr std::int64_t kKeyPadding = 64;

namespace select {

using std::int64_t;

// A key that the `slots` largest are not below: of the largest key in each of kGroups interleaved
// groups, the one in place `slots`. Most other keys are below it.
template <int kGroups, class Key>
static inline Key threshold(const Key* keys, int64_t size, int64_t slots) {
  Key largest[kGroups];
  for (int g = 0; g < kGroups; ++g) largest[g] = keys[g];
  for (int64_t i = kGroups; i < size; i += kGroups)
    for (int g = 0; g < kGroups; ++g)
      largest[g] = keys[i + g] > largest[g] ? keys[i + g] : largest[g];
  Key above[kGroups] = {};  // how many groups have a larger key
  for (int h = 0; h < kGroups; ++h)
    for (int g = 0; g < kGroups; ++g) above[g] += largest[h] > largest[g];
  Key result = ~kNone<Key>;
  for (int g = 0; g < kGroups; ++g)
    result = above[g] < slots && largest[g] < result ? largest[g] : result;
  return result;
}

// By counting how many come before each of the few keys that are not below a threshold. False if
// they are many: with many equal keys.
template <int kGroups, class Key>
static inline bool by_rank(const Key* keys, int64_t size, int64_t slots, int64_t* best) {
  constexpr int kMost = 64, kChunk = 16;
  if (size > INT_MAX) return false;
  const Key bound = threshold<kGroups>(keys, size, slots);
  Key kept[kMost + 2 * kChunk], ranks[kMost + 2 * kChunk];
  std::int32_t index[kMost + 2 * kChunk];
  int count = 0;
  for (int64_t i = 0; i < size; i += kChunk) {
    if (count > kMost) return false;
    count +=
        keep_at_least(keys + i, bound, static_cast<std::int32_t>(i), kept + count, index + count);
  }
  const int past = (count + kChunk - 1) / kChunk * kChunk;
  for (int i = count; i < past; ++i) kept[i] = keys[0];
  for (int i = 0; i < past; ++i) ranks[i] = 0;
  for (int j = 0; j < count; ++j)
    for (int i = 0; i < past; ++i)
      ranks[i] += (kept[j] > kept[i]) | ((kept[j] == kept[i]) & (j < i));
  std::int32_t in_order[kMost + 2 * kChunk];
  for (int i = 0; i < count; ++i) in_order[ranks[i]] = index[i];
  for (int64_t j = 0; j < slots; ++j) best[j] = in_order[j];
  return true;
}

// Best first; in place, in a time that does not depend on the order of the input.
template <class Key> static inline void heap_sort(const Key* keys, int64_t* items, int64_t size) {
  const auto before = [&](int64_t a, int64_t b) {
    return keys[a] > keys[b] || (keys[a] == keys[b] && a < b);
  };
  // Below `i` each item comes before its parent: the last of all is the root.
  const auto sift = [&](int64_t i, int64_t past) {
    const int64_t item = items[i];
    for (int64_t child; (child = 2 * i + 1) < past; i = child) {
      if (child + 1 < past && before(items[child], items[child + 1])) ++child;
      if (!before(item, items[child])) break;
      items[i] = items[child];
    }
    items[i] = item;
  };
  for (int64_t i = size / 2; i-- > 0;) sift(i, size);
  for (int64_t past = size; past-- > 1;) {
    const int64_t last = items[0];
    items[0] = items[past];
    items[past] = last;
    sift(0, past);
  }
}

// By finding the last key that is kept, byte by byte from the top: for any number of slots.
template <class Key>
static inline void by_radix(const Key* keys, int64_t size, int64_t slots, int64_t* best) {
  constexpr int kBits = 8 * sizeof(Key);
  constexpr auto kTop = std::uint64_t{1} << (kBits - 1);
  const auto digits = [](Key key) {
    return kBits == 32 ? std::uint64_t{static_cast<std::uint32_t>(key)} ^ kTop
                       : static_cast<std::uint64_t>(key) ^ kTop;
  };
  std::uint64_t last = 0;
  int64_t remaining = slots;  // of those with the digits of `last` found so far
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < size; ++i)
      if (((digits(keys[i]) ^ last) >> shift) < 256) ++counts[digits(keys[i]) >> shift & 255];
    std::uint64_t digit = 255;
    for (; counts[digit] < remaining; --digit) remaining -= counts[digit];
    last |= digit << shift;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i)
    if (digits(keys[i]) > last || (digits(keys[i]) == last && remaining-- > 0)) best[count++] = i;
  heap_sort(keys, best, slots);
}

}  // namespace select

// The indices of the `slots` largest keys, largest first.
template <class Key>
static inline void select_keys(Key* keys, std::int64_t size, std::int64_t slots,
                               std::int64_t* best) {
  for (std::int64_t i = 0; i < kKeyPadding; ++i) keys[size + i] = kNone<Key>;
  const bool done = slots <= 8    ? select::by_rank<16>(keys, size, slots, best)
                    : slots <= 16 ? select::by_rank<32>(keys, size, slots, best)
                                  : slots <= 32 && select::by_rank<64>(keys, size, slots, best);
  if (!done) select::by_radix(keys, size, slots, best);
}

}  // namespace torch_routers
