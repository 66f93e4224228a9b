#include <cmath>
#include <optional>

#include "bytes.h"
#include "common/score.h"
#include "gate/gate_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class T> T* data(const std::optional<Array<T>>& array) {
  return array ? array->data() : nullptr;
}

template <class T> struct Inputs {
  GateShape shape;
  bool select, renormalize, statistics;
  Array<T> logits;
  std::optional<Array<bool>> valid;
  std::optional<Array<int64_t>> offsets;
  Array<int64_t> indices;  // where they are not selected
  std::optional<Array<T>> grad_weights, grad_lse, grad_score_sums;

  explicit Inputs(Bytes& bytes)
      : shape{bytes.size(0, 200), bytes.size(1, 150), 0, bytes.size(1, 9)},
        select(bytes.flag()),
        renormalize(bytes.flag()),
        statistics(bytes.flag()),
        logits(bytes.numbers<T>(shape.tokens * shape.experts)),
        indices(0) {
    shape.slots = bytes.size(select, select ? shape.experts : 12);
    if (bytes.flag()) valid = bytes.flags(shape.tokens);
    if (shape.groups > 1 || bytes.flag()) offsets = bytes.offsets(shape.groups, shape.tokens);
    if (!select) indices = bytes.integers(shape.tokens * shape.slots, -1, shape.experts - 1);
    if (bytes.flag()) grad_weights = bytes.numbers<T>(shape.tokens * shape.slots);
    if (bytes.flag()) grad_lse = bytes.numbers<T>(shape.tokens);
    if (bytes.flag()) grad_score_sums = bytes.numbers<T>(shape.groups * shape.experts);
  }
};

template <class T> struct Results {
  Array<int64_t> indices;
  Array<T> weights, lse, score_sums, grad_logits;
  Array<int64_t> counts, group_tokens;

  // In two parts, the latter first.
  Results(const Inputs<T>& in, Isa isa, double cut, unsigned char fill)
      : indices(in.shape.tokens * in.shape.slots, fill),
        weights(in.shape.tokens * in.shape.slots, fill),
        lse(in.statistics ? in.shape.tokens : 0, fill),
        score_sums(in.statistics ? in.shape.groups * in.shape.experts : 0, fill),
        grad_logits(in.shape.tokens * in.shape.experts, fill),
        counts(in.shape.groups * in.shape.experts, fill),
        group_tokens(in.shape.groups, fill) {
    const auto run = [&](const auto& params, int64_t count) {
      const auto middle = static_cast<int64_t>(cut * count);
      TORCH_ROUTERS_PICK_ISA(isa, gate(params, middle, count));
      TORCH_ROUTERS_PICK_ISA(isa, gate(params, 0, middle));
    };
    const GateShape& shape = in.shape;
    if (!in.select) std::copy(in.indices.begin(), in.indices.end(), indices.begin());
    Array<T> scores(shape.blocks() * shape.experts, fill);
    Array<T> partial_sums(shape.segments() * shape.experts, fill);
    Array<int64_t> partial_counts(shape.segments() * shape.experts, fill);

    Gate<T> forward{};
    static_cast<GateShape&>(forward) = shape;
    forward.logits = in.logits.data();
    forward.valid = data(in.valid);
    forward.group_offsets = data(in.offsets);
    forward.indices = indices.data();
    forward.weights = weights.data();
    forward.lse = in.statistics ? lse.data() : nullptr;
    forward.scores = scores.data();
    forward.partial_sums = partial_sums.data();
    forward.partial_counts = partial_counts.data();
    forward.select = in.select;
    forward.renormalize = in.renormalize;
    run(forward, shape.blocks());

    GateCombine<T> combine{};
    static_cast<GateShape&>(combine) = shape;
    combine.valid = data(in.valid);
    combine.group_offsets = data(in.offsets);
    combine.partial_sums = partial_sums.data();
    combine.partial_counts = partial_counts.data();
    combine.score_sums = in.statistics ? score_sums.data() : nullptr;
    combine.counts = counts.data();
    combine.group_tokens = group_tokens.data();
    run(combine, shape.groups);

    GateBackward<T> backward{};
    static_cast<GateShape&>(backward) = shape;
    backward.grad_weights = data(in.grad_weights);
    backward.grad_lse = data(in.grad_lse);
    backward.grad_score_sums = data(in.grad_score_sums);
    backward.logits = in.logits.data();
    backward.valid = data(in.valid);
    backward.group_offsets = data(in.offsets);
    backward.indices = indices.data();
    backward.grad_logits = grad_logits.data();
    backward.renormalize = in.renormalize;
    run(backward, shape.tokens);
  }

  bool operator==(const Results&) const = default;
};

// The experts of a row are distinct, best first, and none that is left out is better than the last.
template <class T> void check_selection(const T* logits, int64_t experts, const int64_t* indices,
                                        int64_t slots) {
  const auto before = [&](int64_t a, int64_t b) {
    const auto x = rank_key(logits[a]), y = rank_key(logits[b]);
    return x > y || (x == y && a < b);
  };
  Array<bool> taken(experts);
  for (int64_t j = 0; j < slots; ++j) {
    expect(0 <= indices[j] && indices[j] < experts, "indices of experts");
    expect(j == 0 || before(indices[j - 1], indices[j]), "indices in order");
    taken[indices[j]] = true;
  }
  for (int64_t e = 0; e < experts; ++e)
    expect(taken[e] || before(indices[slots - 1], e), "the best experts");
}

template <class T> void check_results(const Inputs<T>& in, const Results<T>& out) {
  const auto [tokens, experts, slots, groups] = in.shape;
  int64_t valid = 0, counted = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const T *x = &in.logits[t * experts], *weights = &out.weights[t * slots];
    const int64_t* indices = &out.indices[t * slots];
    if (in.valid && !(*in.valid)[t]) {
      for (int64_t j = 0; j < slots; ++j) {
        expect(!in.select || indices[j] == -1, "masked tokens without experts");
        expect(weights[j] == 0, "masked tokens without weights");
      }
      for (int64_t e = 0; e < experts; ++e)
        expect(out.grad_logits[t * experts + e] == 0, "masked tokens without gradients");
      continue;
    }
    ++valid;
    if (in.select) check_selection(x, experts, indices, slots);
    const bool finite = std::all_of(x, x + experts, [](T value) { return std::isfinite(value); });
    double sum = 0;
    for (int64_t j = 0; j < slots; ++j) {
      counted += indices[j] >= 0;
      sum += weights[j];
      expect(!finite || (0 <= weights[j] && weights[j] < 1.001), "weights in [0, 1]");
    }
    if (finite && in.select && in.renormalize) expect(std::abs(sum - 1) < 1e-3, "a sum of one");
  }
  for (const int64_t count : out.counts) counted -= count;
  expect(counted == 0, "counts of all slots");
  for (const int64_t count : out.group_tokens) valid -= count;
  expect(valid == 0, "all valid tokens in groups");
}

template <class T> void fuzz_gate(Bytes& bytes) {
  const Isa other = bytes.any_isa();
  const double cut = bytes.ConsumeProbability<double>();
  const Inputs<T> in(bytes);
  const Results<T> out(in, Isa::Default, 1, kFills[0]);
  expect(out == Results<T>(in, other, cut, kFills[1]), "equal results of both runs");
  check_results(in, out);
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  torch_routers::fuzz::Bytes bytes(data, size);
  if (bytes.flag())
    torch_routers::fuzz::fuzz_gate<float>(bytes);
  else
    torch_routers::fuzz::fuzz_gate<double>(bytes);
  return 0;
}
