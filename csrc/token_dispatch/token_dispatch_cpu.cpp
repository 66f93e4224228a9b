#include "common/row.h"
#include "common/stream.h"
#include "token_dispatch/token_dispatch_kernel.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;
constexpr int64_t kTile = 512;  // elements: a tile stays in the first cache
constexpr int kAtOnce = 8;      // rows that are added in one pass

template <class T> std::size_t bytes(int64_t size) {
  return static_cast<std::size_t>(size) * sizeof(T);
}

// ---- to rows -----------------------------------------------------------------------------------

// Rows are far apart: the processor begins to fetch one on its own only after its first lines.
template <class T>
void prefetch(const DispatchPlan& p, const T* rows, int64_t first_slot, int64_t count) {
  constexpr int64_t kLine = 64, kLines = 8;
  for (int64_t i = first_slot; i < first_slot + count && i < p.tokens * p.slots; ++i) {
    if (p.inverse[i] < 0) continue;
    const auto* row = reinterpret_cast<const char*>(rows + p.inverse[i] * p.hidden);
    const auto size = static_cast<int64_t>(bytes<T>(p.hidden));
    for (int64_t b = 0; b < kLines * kLine && b < size; b += kLine) __builtin_prefetch(row + b);
  }
}

// Rows as a whole are written past the caches if they are large.
template <class T> class RowWriter {
 public:
  RowWriter(const DispatchPlan& p, T* rows)
      : rows_(rows),
        hidden_(p.hidden),
        stream_(p.max_rows * p.hidden * sizeof(T) >= kStreamBytes) {}

  void copy(int64_t row, const T* token) const {
    T* to = rows_ + row * hidden_;
    if (stream_)
      stream_copy(to, token, bytes<T>(hidden_));
    else if (hidden_ > 0)  // else there may be no memory
      memcpy(to, token, bytes<T>(hidden_));
  }

  void scale(int64_t row, const T* token, Compute<T> weight) const {
    T* to = rows_ + row * hidden_;
    if (!stream_) return scale(token, weight, hidden_, to);
    T tile[kTile];
    for (int64_t h = 0; h < hidden_; h += kTile) {
      const int64_t size = hidden_ - h < kTile ? hidden_ - h : kTile;
      scale(token + h, weight, size, tile);
      stream_copy(to + h, tile, bytes<T>(size));
    }
  }

  void finish() const {
    if (stream_) stream_fence();
  }

 private:
  static void scale(const T* __restrict from, Compute<T> weight, int64_t size, T* __restrict to) {
    for (int64_t h = 0; h < size; ++h) store(&to[h], weight * load(from[h]));
  }

  T* rows_;
  int64_t hidden_;
  bool stream_;
};

// ---- to tokens ---------------------------------------------------------------------------------

// sums[h] = start + sum over j, in order, of weights[j] * rows[j][first + h]; start is 0 or sums[h].
template <int kRows, bool kFromZero, class T, class Sum>
void add(const T* const* rows, const Compute<T>* weights, int64_t first, int64_t size,
         Sum* __restrict sums) {
  const T* row[kRows + 1];
  Compute<T> weight[kRows + 1];
  for (int j = 0; j < kRows; ++j) {
    row[j] = rows[j] + first;
    weight[j] = weights[j];
  }
  for (int64_t h = 0; h < size; ++h) {
    Compute<T> sum = kFromZero ? Compute<T>{0} : load(sums[h]);
    for (int j = 0; j < kRows; ++j) sum += weight[j] * load(row[j][h]);
    store(&sums[h], sum);
  }
}

template <bool kFromZero, int kRows = kAtOnce, class T, class Sum>
void add(int count, const T* const* rows, const Compute<T>* weights, int64_t first, int64_t size,
         Sum* sums) {
  if (count == kRows)
    add<kRows, kFromZero>(rows, weights, first, size, sums);
  else if constexpr (kRows > 0)
    add<kFromZero, kRows - 1>(count, rows, weights, first, size, sums);
}

// The next rows of a token, at most kAtOnce, from slot `slot` on, which moves past them.
template <class T> struct Rows {
  const T* rows[kAtOnce];
  Compute<T> weights[kAtOnce];
  int count = 0;

  Rows(const Combine<T>& p, int64_t token, int64_t& slot) {
    for (; slot < p.slots && count < kAtOnce; ++slot) {
      const int64_t i = token * p.slots + slot;
      if (p.inverse[i] < 0) continue;
      rows[count] = p.row + p.inverse[i] * p.hidden;
      weights[count++] = p.weights ? p.weights[i] : 1;
    }
  }
};

// A token of more rows than are added in one pass.
template <class T>
void combine_tile(const Combine<T>& p, int64_t token, int64_t first, int64_t size, T* to) {
  Compute<T> sums[kTile];
  for (int64_t h = 0; h < size; ++h) sums[h] = 0;
  for (int64_t slot = 0; slot < p.slots;) {
    const Rows<T> rows(p, token, slot);
    add<false>(rows.count, rows.rows, rows.weights, first, size, sums);
  }
  for (int64_t h = 0; h < size; ++h) store(&to[h], sums[h]);
}

}  // namespace

template <class T> void dispatch(const Permute<T>& p, int64_t begin, int64_t end) {
  const RowWriter<T> writer(p, p.row);
  for (int64_t t = begin; t < end; ++t) {
    const T* token = p.token + t * p.hidden;
    for (int64_t i = t * p.slots; i < (t + 1) * p.slots; ++i) {
      if (p.inverse[i] < 0) continue;
      if (p.weights)
        writer.scale(p.inverse[i], token, p.weights[i]);
      else
        writer.copy(p.inverse[i], token);
    }
  }
  writer.finish();
}

template <class T> void dispatch(const Combine<T>& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    T* token = p.token + t * p.hidden;
    prefetch(p, p.row, (t + 1) * p.slots, p.slots < kAtOnce ? p.slots : kAtOnce);
    int64_t slot = 0;
    const Rows<T> rows(p, t, slot);
    if (slot == p.slots) {
      add<true>(rows.count, rows.rows, rows.weights, 0, p.hidden, token);
      continue;
    }
    for (int64_t h = 0; h < p.hidden; h += kTile)
      combine_tile(p, t, h, p.hidden - h < kTile ? p.hidden - h : kTile, token + h);
  }
}

template <class T> void dispatch(const CombineBackward<T>& p, int64_t begin, int64_t end) {
  const RowWriter<T> writer(p, p.grad_row);
  for (int64_t t = begin; t < end; ++t) {
    const T* token = p.token + t * p.hidden;
    for (int64_t i = t * p.slots; i < (t + 1) * p.slots; ++i) {
      prefetch(p, p.row, i + 1, 1);
      p.grad_weights[i] = 0;
      if (p.inverse[i] < 0) continue;
      const T* row = p.row + p.inverse[i] * p.hidden;
      p.grad_weights[i] =
          sum_row<Compute<T>>(p.hidden, [&](int64_t h) { return load(token[h]) * load(row[h]); });
      if (p.weights) writer.scale(p.inverse[i], token, p.weights[i]);
    }
  }
  writer.finish();
}

template <class T> void dispatch(const ClearUnused<T>& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r)
    if (p.order[r] < 0 && p.hidden > 0) memset(p.row + r * p.hidden, 0, bytes<T>(p.hidden));
}

#define TORCH_ROUTERS_INSTANTIATE(T)                                 \
  template void dispatch(const Permute<T>&, int64_t, int64_t);         \
  template void dispatch(const Combine<T>&, int64_t, int64_t);         \
  template void dispatch(const CombineBackward<T>&, int64_t, int64_t); \
  template void dispatch(const ClearUnused<T>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
