// kLanes tokens at a time where experts are few, an expert's numbers of all of them side by side; else
// row by row. Which one it is depends on the number of experts alone.
#include "common/tile.h"
#include "ragged_select/ragged_select_kernel.h"
#include "ragged_select/ragged_select_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;
constexpr int64_t kTileExperts = 512;
template <class T> constexpr T kLowestLogit = -static_cast<T>(__builtin_huge_val());

template <class T> void store_row(const RaggedSelect<T>& p, int64_t t, const RaggedSums<T>& sums) {
  const int64_t count = ragged_count(p, t, sums);
  for (int64_t j = 0; j < p.slots; ++j)
    p.indices[t * p.slots + j] = j < count ? p.order[t * p.slots + j] : -1;
}

template <class T> void row(const RaggedSelect<T>& p, int64_t t) {
  const T* z = p.logits + t * p.experts;
  const T max = max_row(p.experts, kLowestLogit<T>, [&](int64_t e) { return z[e]; });
  const T sum = sum_row<T>(p.experts, [&](int64_t e) { return own_exp(z[e] - max); });
  const T product = sum_row<T>(
      p.experts, [&](int64_t e) { return ragged_product(own_exp(z[e] - max), z[e] - max); });
  store_row(p, t, {max, sum, product});
}

template <class T> void tile(const RaggedSelect<T>& p, int64_t first, int64_t count) {
  alignas(64) Lanes<T> z[kTileExperts], powers[kTileExperts];
  alignas(64) Lanes<T> max, sum, product;
  bool live[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) live[l] = l < count;
  load_tile(p.logits + first * p.experts, p.experts, live, z);
  each_vector<T>([&](int l) {
    Vector<T> largest = Vector<T>{} + kLowestLogit<T>;
    for (int64_t e = 0; e < p.experts; ++e) {
      const Vector<T> x = load_vector(z[e] + l);
      largest = x > largest ? x : largest;
    }
    store_vector(max + l, largest);
  });
  for (int64_t e = 0; e < p.experts; ++e)
    each_lane([&](int l) {
      const T distance = z[e][l] - max[l];
      powers[e][l] = own_exp(distance);
      z[e][l] = ragged_product(powers[e][l], distance);
    });
  sum_tile<T>(p.experts, [&](int64_t e, int l) { return load_vector(powers[e] + l); }, sum);
  sum_tile<T>(p.experts, [&](int64_t e, int l) { return load_vector(z[e] + l); }, product);
  for (int64_t l = 0; l < count; ++l) store_row(p, first + l, {max[l], sum[l], product[l]});
}

}  // namespace

template <class T> void ragged_select(const RaggedSelect<T>& p, int64_t begin, int64_t end) {
  if (p.experts > kTileExperts)
    for (int64_t t = begin; t < end; ++t) row(p, t);
  else
    for (int64_t t = begin; t < end; t += kLanes) tile(p, t, end - t < kLanes ? end - t : kLanes);
}

template void ragged_select(const RaggedSelect<float>&, int64_t, int64_t);
template void ragged_select(const RaggedSelect<double>&, int64_t, int64_t);

}  // namespace torch_routers::TORCH_ROUTERS_ISA
