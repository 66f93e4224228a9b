#include <numeric>

#include "bytes.h"
#include "common/stream.h"
#include "token_dispatch/token_dispatch_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class T> struct Inputs {
  int64_t tokens, slots, hidden, rows;
  Array<int64_t> order, inverse;
  Array<T> token, row;
  std::optional<Array<Compute<T>>> weights;

  explicit Inputs(Bytes& bytes)
      : tokens(bytes.size(0, 40)),
        slots(bytes.size(0, 20)),
        hidden(bytes.size(0, 80)),
        order(0),
        inverse(tokens * slots),
        token(0),
        row(0) {
    // Long rows, seldom: they are worked on in tiles.
    if (bytes.integer(0, 15) == 15) {
      hidden = bytes.integer(500, 1100);
      tokens = std::min<int64_t>(tokens, 4);
      inverse = Array<int64_t>(tokens * slots);
    }
    make_plan(bytes, bytes.integer(0, 3) == 3);
    const int64_t kind = bytes.kind(), weights_kind = bytes.kind();
    token = bytes.numbers<T>(tokens * hidden, kind);
    row = bytes.numbers<T>(rows * hidden, kind);
    if (bytes.flag()) weights = bytes.numbers<Compute<T>>(tokens * slots, weights_kind);
  }

  // Any slots, in any order, and rows without a slot among them.
  void make_plan(Bytes& bytes, bool full) {
    const int64_t size = tokens * slots, spare = bytes.size(0, 20);
    const Array<bool> empty = bytes.flags(full ? 0 : size);
    const Array<int64_t> place = bytes.integers(size + spare, 0, 255);
    Array<int64_t> slot_of(size + spare);
    std::iota(slot_of.begin(), slot_of.end(), 0);
    const auto past = std::remove_if(slot_of.begin(), slot_of.end(), [&](int64_t slot) {
      return !full && slot < size && empty[slot];
    });
    std::stable_sort(slot_of.begin(), past,
                     [&](int64_t a, int64_t b) { return place[a] < place[b]; });
    rows = past - slot_of.begin();
    order = Array<int64_t>(rows);
    std::fill(inverse.begin(), inverse.end(), -1);
    for (int64_t r = 0; r < rows; ++r) {
      order[r] = slot_of[r] < size ? slot_of[r] : -1;
      if (order[r] >= 0) inverse[order[r]] = r;
    }
  }
  Compute<T> weight(int64_t slot) const { return weights ? (*weights)[slot] : 1; }
};

template <class T> struct Results {
  Array<T> row, token, grad_row;
  Array<Compute<T>> grad_weights;

  Results(const Inputs<T>& in, Isa isa, double cut, bool streamed, unsigned char fill)
      : row(in.rows * in.hidden, fill),
        token(in.tokens * in.hidden, fill),
        grad_row(in.weights ? in.rows * in.hidden : 0, fill),
        grad_weights(in.tokens * in.slots, fill) {
    const auto run = [&](const auto& params, int64_t count) {
      in_parts(cut, count, [&](int64_t begin, int64_t end) {
        TORCH_ROUTERS_PICK_ISA(isa, dispatch(params, begin, end));
      });
    };
    const DispatchPlan plan{in.tokens, in.slots,        in.rows,
                            in.hidden, in.order.data(), in.inverse.data()};
    // Of a result that is written past the caches, those rows that the plan names are there.
    DispatchPlan large = plan;
    if (streamed) large.max_rows += kStreamBytes;
    run(Permute<T>{large, in.token.data(), data(in.weights), row.data()}, in.tokens);
    run(ClearUnused<T>{plan, row.data()}, in.rows);
    run(Combine<T>{plan, in.row.data(), data(in.weights), token.data()}, in.tokens);
    run(CombineBackward<T>{large, in.token.data(), in.row.data(), data(in.weights),
                           in.weights ? grad_row.data() : nullptr, grad_weights.data()},
        in.tokens);
    if (in.weights) run(ClearUnused<T>{plan, grad_row.data()}, in.rows);
  }

  bool operator==(const Results&) const = default;
};

// The sums, in their order of addition.
template <class T> Compute<T> dot(const T* a, const T* b, int64_t size) {
  Compute<T> lanes[16] = {};
  for (int64_t h = 0; h < size; ++h) lanes[h % 16] += load(a[h]) * load(b[h]);
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <class T> void check_results(const Inputs<T>& in, const Results<T>& out) {
  const int64_t hidden = in.hidden;
  Array<T> row(in.rows * hidden), token(in.tokens * hidden);
  Array<Compute<T>> sums(in.tokens * hidden), grad_weights(in.tokens * in.slots);
  for (int64_t i = 0; i < in.inverse.size(); ++i) {
    const int64_t r = in.inverse[i], t = i / in.slots;
    if (r < 0) continue;
    for (int64_t h = 0; h < hidden; ++h) {
      if (in.weights)
        store(&row[r * hidden + h], in.weight(i) * load(in.token[t * hidden + h]));
      else
        row[r * hidden + h] = in.token[t * hidden + h];
      sums[t * hidden + h] += in.weight(i) * load(in.row[r * hidden + h]);
    }
    grad_weights[i] = dot(in.token.data() + t * hidden, in.row.data() + r * hidden, hidden);
  }
  for (int64_t i = 0; i < sums.size(); ++i) store(&token[i], sums[i]);
  expect(out.row == row, "in each row the token of its slot, times the weight");
  expect(out.token == token, "in each token the sum of its rows, times their weights");
  expect(out.grad_weights == grad_weights, "as gradient of a weight the product of token and row");
  expect(!in.weights || out.grad_row == row, "as gradient of a row that of its token");
}

template <class T> void fuzz_token_dispatch(Bytes& bytes) {
  const Isa other = bytes.any_isa();
  const double cut = bytes.share();
  const bool streamed = bytes.flag();
  const Inputs<T> in(bytes);
  const Results<T> out(in, Isa::Default, 1, false, kFills[0]);
  expect(out == Results<T>(in, other, cut, streamed, kFills[1]), "equal results of both runs");
  check_results(in, out);
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_routers::fuzz;
  Bytes bytes(data, size);
  bytes.pick_type([&]<class T> { fuzz_token_dispatch<T>(bytes); });
  return 0;
}
