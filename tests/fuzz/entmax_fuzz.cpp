#include <cmath>

#include "bytes.h"
#include "entmax/entmax_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class S> struct Inputs {
  using C = Compute<S>;
  EntmaxShape shape;
  bool is_learned;
  C alpha;
  Array<S> logits;
  std::optional<Array<bool>> valid;
  Array<C> grad_weights;

  explicit Inputs(Bytes& bytes)
      : shape{bytes.size(0, 90), bytes.size(1, 300)},
        is_learned(bytes.flag()),
        logits(0),
        grad_weights(0) {
    constexpr C kAlphas[] = {1, C(1.00005), C(1.001), C(1.3), 1.5, C(1.8), 2, 2.5, 4, 50};
    const int64_t choice = bytes.integer(0, 12);
    alpha = choice < 10 ? kAlphas[choice] : bytes.numbers<C>(1, bytes.kind())[0];
    logits = bytes.numbers<S>(shape.tokens * shape.experts, bytes.kind());
    if (bytes.flag()) valid = bytes.flags(shape.tokens);
    grad_weights = bytes.numbers<C>(shape.tokens * shape.experts, bytes.kind());
  }
};

template <class S> struct Results {
  using C = Compute<S>;
  Array<C> weights, grad_logits, grad_alpha;
  Array<int64_t> counts;

  Results(const Inputs<S>& in, Isa isa, double cut, unsigned char fill)
      : weights(in.logits.size(), fill),
        grad_logits(in.logits.size(), fill),
        grad_alpha(in.is_learned, fill),
        counts(in.shape.experts, fill) {
    const EntmaxShape& shape = in.shape;
    const auto run = [&](const auto& params, int64_t count) {
      in_parts(cut, count, [&](int64_t begin, int64_t end) {
        TORCH_ROUTERS_PICK_ISA(isa, entmax(params, begin, end));
      });
    };
    const Array<int64_t> partial(shape.blocks() * shape.experts, fill);
    const Array<double> partial_alpha(shape.blocks(), fill);
    const EntmaxAlpha<C> alpha{in.is_learned ? &in.alpha : nullptr, double{in.alpha}};
    run(Entmax<S>{shape, in.logits.data(), data(in.valid), alpha, weights.data(), partial.data()},
        shape.blocks());
    run(EntmaxCounts{shape, partial.data(), counts.data()}, shape.experts);
    run(EntmaxBackward<C>{shape, in.grad_weights.data(), weights.data(), alpha, grad_logits.data(),
                          in.is_learned ? partial_alpha.data() : nullptr},
        shape.blocks());
    if (in.is_learned)
      TORCH_ROUTERS_PICK_ISA(
          isa, entmax(EntmaxAlphaSum<C>{shape, partial_alpha.data(), grad_alpha.data()}, 0, 1));
  }

  bool operator==(const Results&) const = default;
};

template <class S> void check_results(const Inputs<S>& in, const Results<S>& out) {
  const auto [tokens, experts] = in.shape;
  Array<int64_t> counts(experts);
  const bool has_alpha = in.alpha >= 1 && in.alpha - in.alpha == 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const bool masked = in.valid && !(*in.valid)[t];
    bool is_number = has_alpha, is_hidden = true;
    double sum = 0, largest = -HUGE_VAL;
    int64_t best = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const double x = load(in.logits[t * experts + e]);
      is_number &= x < HUGE_VAL;
      is_hidden &= x == -HUGE_VAL;
      if (x > largest) largest = x, best = e;
    }
    for (int64_t e = 0; e < experts; ++e) {
      const double p = out.weights[t * experts + e];
      counts[e] += p != 0;
      sum += p;
      expect(!masked || p == 0, "no weight of a masked token");
      expect(!masked || out.grad_logits[t * experts + e] == 0, "no gradient of a masked token");
      expect(masked || is_number || std::isnan(p), "a row of NaN");
      if (masked || !is_number) continue;
      expect(0 <= p && p <= 1.0001, "a probability");
      expect(load(in.logits[t * experts + e]) != -HUGE_VAL || p == 0, "no weight of -infinity");
      expect(is_hidden || p <= out.weights[t * experts + best], "the order of the logits");
    }
    if (!masked && is_number && !is_hidden) expect(std::abs(sum - 1) < 1e-4, "a sum of one");
  }
  expect(counts == out.counts, "the counts of what is not 0");
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
