// Formulas of limit_capacity_kernel.h shared by CPU and CUDA: segments, keys, and what is kept.
#pragma once

#include "common/philox.h"
#include "common/score.h"
#include "limit_capacity/limit_capacity_kernel.h"

namespace torch_routers {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

// The first row of [first, past) with a slot that is not below `slot`. For a larger `slot` it never
// is an earlier one, whatever the order of the rows: the search takes the same turns, and at some
// point to the right.
TORCH_ROUTERS_HOST_DEVICE static inline std::int64_t first_row_from(const std::int64_t* order,
                                                                    std::int64_t first,
                                                                    std::int64_t past,
                                                                    std::int64_t slot) {
  while (first < past) {
    const std::int64_t middle = first + (past - first) / 2;
    if (order[middle] < slot)
      first = middle + 1;
    else
      past = middle;
  }
  return first;
}

// Of a plan whose offsets ascend.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline Segment segment_of(const CapacitySelect<T>& p,
                                                           std::int64_t index) {
  const std::int64_t expert = index / p.groups, group = index % p.groups;
  const std::int64_t begin = p.offsets[expert], end = p.offsets[expert + 1];
  const auto first_of = [&](std::int64_t g) {
    if (g == 0) return begin;
    return g == p.groups ? end : first_row_from(p.order, begin, end, p.group_offsets[g] * p.slots);
  };
  const std::int64_t first = first_of(group), rows = first_of(group + 1) - first;
  const std::int64_t capacity = p.capacity[group] < 0 ? 0 : p.capacity[group];
  return {first, rows, rows < capacity ? rows : capacity, 0, 0, 0};
}

// Bits of the largest key.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline int key_bits(const CapacitySelect<T>& p) {
  if (p.policy == DropPolicy::Random) return 64;
  if (p.policy != DropPolicy::Position) return 8 * sizeof(Compute<T>);
  int bits = kDigitBits;
  while (bits < 64 && (p.slots - 1) >> bits) bits += kDigitBits;
  return bits;
}

template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline std::uint64_t key_of(const CapacitySelect<T>& p,
                                                             std::int64_t row,
                                                             std::int64_t expert) {
  const std::int64_t slot = p.order[row];
  if (slot < 0 || slot >= p.all_slots()) return ~std::uint64_t{0} >> (64 - key_bits(p));
  const std::int64_t token = slot / p.slots;
  const auto descending = [](auto key) { return static_cast<decltype(key)>(~key); };
  switch (p.policy) {
    case DropPolicy::Position: return static_cast<std::uint64_t>(slot % p.slots);
    case DropPolicy::Weight: return descending(rank_key(load(p.scores[slot])));
    case DropPolicy::Priority: return descending(rank_key(load(p.scores[token])));
    default: break;
  }
  const std::int64_t id = p.row_ids ? p.row_ids[token] : token;
  const RandomWords random = random_words(*p.seed, Purpose::Capacity, id, expert);
  return std::uint64_t{random.words[1]} << 32 | random.words[0];
}

// Radix select, the highest digit first: the keys that begin as the limit does are counted by their
// next digit; that of the limit is the one that the last kept row falls under.
namespace {
struct RadixSelect {
  std::uint64_t limit = 0, decided = 0;
  std::int64_t wanted;  // of the keys that begin so
  int shift;            // to the next digit
  bool done = false;

  TORCH_ROUTERS_HOST_DEVICE RadixSelect(std::int64_t kept, int bits)
      : wanted(kept), shift(bits - kDigitBits) {}
  TORCH_ROUTERS_HOST_DEVICE bool is_open(std::uint64_t key) const {
    return ((key ^ limit) & decided) == 0;
  }
  TORCH_ROUTERS_HOST_DEVICE int digit(std::uint64_t key) const {
    return static_cast<int>(key >> shift & (kDigits - 1));
  }
  // `count` open keys have the digit, `before` a smaller one.
  TORCH_ROUTERS_HOST_DEVICE void take(int digit, std::int64_t before, std::int64_t count) {
    limit |= static_cast<std::uint64_t>(digit) << shift;
    decided |= std::uint64_t{kDigits - 1} << shift;
    wanted -= before;
    done = shift == 0 || count == wanted;
    if (count == wanted) limit |= (std::uint64_t{1} << shift) - 1;  // all of them are kept
    shift -= kDigitBits;
  }
};
}  // namespace

// Rows of the old and the new plan that belong to experts, once segments are placed.
TORCH_ROUTERS_HOST_DEVICE static inline std::int64_t rows_before(const CapacityShape& shape,
                                                                 const Segment* segments) {
  const Segment& last = segments[shape.num_segments() - 1];
  return last.first + last.rows;
}
TORCH_ROUTERS_HOST_DEVICE static inline std::int64_t rows_after(const CapacityShape& shape,
                                                                const Segment* segments) {
  const Segment& last = segments[shape.num_segments() - 1];
  return last.new_first + last.kept;
}

}  // namespace torch_routers
