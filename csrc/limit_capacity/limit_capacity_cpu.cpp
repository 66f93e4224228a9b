#include <cstring>

#include "limit_capacity/limit_capacity_kernel.h"
#include "limit_capacity/limit_capacity_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

void copy(const int64_t* from, int64_t count, int64_t* to) {
  if (count > 0) std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(int64_t));
}

void find_limit(const std::uint64_t* keys, int bits, Segment& segment) {
  RadixSelect select(segment.kept, bits);
  while (!select.done) {
    int64_t counts[kDigits] = {};
    for (int64_t i = 0; i < segment.rows; ++i)
      if (select.is_open(keys[i])) ++counts[select.digit(keys[i])];
    int64_t before = 0;
    int digit = 0;
    while (before + counts[digit] < select.wanted) before += counts[digit++];
    select.take(digit, before, counts[digit]);
  }
  segment.limit = select.limit;
  segment.ties = select.wanted;
}

}  // namespace

template <class T>
void limit_capacity(const CapacitySelect<T>& p, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    Segment& segment = p.segments[s] = segment_of(p, s);
    if (segment.kept == segment.rows || segment.kept == 0) continue;
    for (int64_t row = segment.first; row < segment.first + segment.rows; ++row)
      p.keys[row] = key_of(p, row, s / p.groups);
    find_limit(p.keys + segment.first, key_bits(p), segment);
  }
}

void limit_capacity(const CapacityPlace& p, int64_t, int64_t) {
  int64_t row = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    p.new_offsets[e] = row;
    for (int64_t s = e * p.groups; s < (e + 1) * p.groups; ++s) {
      p.segments[s].new_first = row;
      row += p.segments[s].kept;
    }
    p.new_counts[e] = row - p.new_offsets[e];
  }
  p.new_offsets[p.experts] = row;
  *p.new_dropped = *p.dropped + rows_before(p, p.segments) - row;
}

void limit_capacity(const CapacityMove& p, int64_t begin, int64_t end) {
  const bool changed = rows_before(p, p.segments) != rows_after(p, p.segments);
  for (int64_t s = begin; s < end; ++s) {
    const Segment& segment = p.segments[s];
    const int64_t past = segment.first + segment.rows;
    int64_t new_row = segment.new_first, ties = segment.ties;
    if (segment.kept == segment.rows) {
      copy(p.order + segment.first, segment.rows, p.new_order + new_row);
      for (int64_t row = segment.first; changed && row < past; ++row) p.new_rows[row] = new_row++;
    } else if (segment.kept == 0) {
      for (int64_t row = segment.first; row < past; ++row) p.new_rows[row] = -1;
    } else {
      for (int64_t row = segment.first; row < past; ++row) {
        const std::uint64_t key = p.keys[row];
        const bool kept = key < segment.limit || (key == segment.limit && ties-- > 0);
        p.new_rows[row] = kept ? new_row : -1;
        if (kept) p.new_order[new_row++] = p.order[row];
      }
    }
  }
}

void limit_capacity(const CapacityRenumber& p, int64_t begin, int64_t end) {
  const int64_t before = rows_before(p, p.segments), after = rows_after(p, p.segments);
  for (int64_t row = begin < after ? after : begin; row < end && row < p.rows; ++row)
    p.new_order[row] = -1;
  const int64_t past = end < p.all_slots() ? end : p.all_slots();
  if (begin >= past) return;
  if (before == after) return copy(p.inverse + begin, past - begin, p.new_inverse + begin);
  for (int64_t slot = begin; slot < past; ++slot) {
    const int64_t row = p.inverse[slot];
    p.new_inverse[slot] = 0 <= row && row < before ? p.new_rows[row] : -1;
  }
}

#define TORCH_ROUTERS_INSTANTIATE(T) \
  template void limit_capacity(const CapacitySelect<T>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
