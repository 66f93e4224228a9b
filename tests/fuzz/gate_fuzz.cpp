#include <cmath>

#include "bytes.h"
#include "common/score.h"
#include "gate_run.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class S> struct Inputs {
  using C = Compute<S>;
  GateShape shape;
  GateSelection<C> selection{};
  GateWeights<C> weighing;
  bool select, statistics;
  Array<S> logits;
  Array<int64_t> indices;  // where they are not selected
  std::optional<Array<C>> bias, grad_weights, grad_lse, grad_score_sums;
  std::optional<Array<bool>> valid;
  std::optional<Array<int64_t>> offsets, token_top_k;

  explicit Inputs(Bytes& bytes)
      : shape{bytes.size(0, 140), 0, 0, bytes.size(1, 9)},
        weighing{static_cast<Score>(bytes.integer(0, 2)), bytes.flag(),
                 bytes.flag() ? C(0) : C(1e-20), bytes.flag() ? C(1) : C(2.5)},
        select(bytes.flag()),
        statistics(bytes.flag()),
        logits(0),
        indices(0) {
    const int64_t expert_groups = select && bytes.flag() ? bytes.integer(2, 6) : 0;
    const int64_t group_size = bytes.size(1, expert_groups ? 20 : 150);
    shape.experts = group_size * std::max<int64_t>(1, expert_groups);
    // Long rows, seldom: they are worked on in other memory.
    if (!expert_groups && bytes.integer(0, 63) == 63) shape.experts = bytes.integer(1000, 1100);
    if (shape.experts > 150) shape.tokens = std::min<int64_t>(shape.tokens, 9);
    int64_t most = select ? shape.experts : 12;
    if (expert_groups) {
      const int64_t kept = bytes.integer(1, expert_groups);
      selection = {nullptr, expert_groups, kept, bytes.integer(1, group_size)};
      most = kept * group_size;
    }
    shape.slots = bytes.size(select, most);

    const bool has_bias = select && bytes.flag(), has_top_k = select && bytes.flag();
    const bool has_valid = bytes.flag(), has_offsets = shape.groups > 1 || bytes.flag();
    const bool has_weights = bytes.flag(), has_lse = bytes.flag(), has_sums = bytes.flag();
    const int64_t kind = bytes.kind(), grad_kind = bytes.kind();

    if (has_bias) bias = bytes.numbers<C>(shape.experts, kind);
    if (has_top_k) token_top_k = bytes.integers(shape.tokens, 0, shape.slots);
    if (has_valid) valid = bytes.flags(shape.tokens);
    if (has_offsets) offsets = bytes.offsets(shape.groups, shape.tokens);
    selection.bias = data(bias);
    logits = bytes.numbers<S>(shape.tokens * shape.experts, kind);
    if (!select) indices = bytes.integers(shape.tokens * shape.slots, -1, shape.experts - 1);
    if (has_weights) grad_weights = bytes.numbers<C>(shape.tokens * shape.slots, grad_kind);
    if (has_lse) grad_lse = bytes.numbers<C>(shape.tokens, grad_kind);
    if (has_sums) grad_score_sums = bytes.numbers<C>(shape.groups * shape.experts, grad_kind);
  }
  int64_t slots_of(int64_t t) const { return token_top_k ? (*token_top_k)[t] : shape.slots; }
};

template <class S> struct Results {
  using C = Compute<S>;
  Array<int64_t> indices;
  Array<C> weights, lse, score_sums;
  Array<S> grad_logits;
  Array<int64_t> counts, group_tokens;

  Results(const Inputs<S>& in, Isa isa, double cut, unsigned char fill)
      : indices(in.shape.tokens * in.shape.slots, fill),
        weights(in.shape.tokens * in.shape.slots, fill),
        lse(in.statistics ? in.shape.tokens : 0, fill),
        score_sums(in.statistics ? in.shape.groups * in.shape.experts : 0, fill),
        grad_logits(in.shape.tokens * in.shape.experts, fill),
        counts(in.shape.groups * in.shape.experts, fill),
        group_tokens(in.shape.groups, fill) {
    if (!in.select) std::copy(in.indices.begin(), in.indices.end(), indices.begin());
    const GateShape& shape = in.shape;
    const Array<C> partial_sums(in.statistics ? shape.segments() * shape.experts : 0, fill);
    const Array<int64_t> partial_counts(shape.segments() * shape.experts, fill);
    const Array<int64_t> partial_tokens(shape.segments(), fill);
    const Array<C> scratch(shape.blocks() * shape.scratch_size(), fill);

    GateArrays<S> a;
    a.shape = shape;
    a.logits = in.logits.data();
    a.valid = data(in.valid);
    a.group_offsets = data(in.offsets);
    a.token_top_k = data(in.token_top_k);
    a.select = in.select;
    a.selection = in.selection;
    a.weighing = in.weighing;
    a.grad_weights = data(in.grad_weights);
    a.grad_lse = data(in.grad_lse);
    a.grad_score_sums = data(in.grad_score_sums);
    a.indices = indices.data();
    a.weights = weights.data();
    a.lse = in.statistics ? lse.data() : nullptr;
    a.score_sums = in.statistics ? score_sums.data() : nullptr;
    a.counts = counts.data();
    a.group_tokens = group_tokens.data();
    a.grad_logits = grad_logits.data();
    a.partial_sums = in.statistics ? partial_sums.data() : nullptr;
    a.partial_counts = partial_counts.data();
    a.partial_tokens = partial_tokens.data();
    a.scratch = scratch.data();
    run_gate(a, [&](const auto& params, int64_t count) {
      in_parts(cut, count, [&](int64_t begin, int64_t end) {
        TORCH_ROUTERS_PICK_ISA(isa, gate(params, begin, end));
      });
    });
  }

  bool operator==(const Results&) const = default;
};

// The experts of a row are distinct; if logits alone rank them, best first and the best there are.
template <class S>
void check_selection(const S* logits, int64_t experts, const int64_t* indices, int64_t slots,
                     bool by_logits) {
  const auto before = [&](int64_t a, int64_t b) {
    const auto x = rank_key(load(logits[a])), y = rank_key(load(logits[b]));
    return x > y || (x == y && a < b);
  };
  Array<bool> taken(experts);
  for (int64_t j = 0; j < slots; ++j) {
    expect(0 <= indices[j] && indices[j] < experts, "indices of experts");
    expect(!taken[indices[j]], "distinct indices");
    taken[indices[j]] = true;
    expect(!by_logits || j == 0 || before(indices[j - 1], indices[j]), "indices in order");
  }
  for (int64_t e = 0; by_logits && slots && e < experts; ++e)
    expect(taken[e] || before(indices[slots - 1], e), "the best experts");
}

template <class S> void check_results(const Inputs<S>& in, const Results<S>& out) {
  const auto [tokens, experts, slots, groups] = in.shape;
  int64_t valid = 0, counted = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const S* x = in.logits.data() + t * experts;
    const auto* weights = out.weights.data() + t * slots;
    const int64_t* indices = out.indices.data() + t * slots;
    const bool masked = in.valid && !(*in.valid)[t];
    const int64_t live = masked ? 0 : in.slots_of(t);
    for (int64_t j = 0; j < slots; ++j) {
      expect(!in.select || j < live || indices[j] == -1, "no experts in empty slots");
      expect((j < live && indices[j] >= 0) || weights[j] == 0, "no weights in empty slots");
    }
    for (int64_t e = 0; masked && e < experts; ++e)
      expect(load(out.grad_logits[t * experts + e]) == 0, "no gradients of masked tokens");
    if (masked) continue;
    ++valid;
    if (in.select) check_selection(x, experts, indices, live, in.selection.by_logits());
    for (int64_t j = 0; j < live; ++j) counted += indices[j] >= 0;

    const bool finite = std::all_of(x, x + experts, [](S v) { return std::isfinite(load(v)); });
    const bool bounded = in.weighing.score != Score::SqrtSoftplus || in.weighing.renormalize;
    for (int64_t j = 0; finite && bounded && j < live; ++j)
      expect(0 <= weights[j] && weights[j] < 1.001 * in.weighing.scale, "weights up to the scale");
  }
  for (const int64_t count : out.counts) counted -= count;
  expect(counted == 0, "counts of all slots");
  for (const int64_t count : out.group_tokens) valid -= count;
  expect(valid == 0, "all valid tokens in groups");
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_routers::fuzz;
  Bytes bytes(data, size);
  bytes.pick_type([&]<class S>() {
    run_twice<Inputs<S>, Results<S>>(
        bytes, [](const auto& in, const auto& out) { check_results(in, out); });
  });
  return 0;
}
