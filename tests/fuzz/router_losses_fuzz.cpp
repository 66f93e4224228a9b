#include <cmath>

#include "bytes.h"
#include "router_losses/router_losses_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class T> struct Inputs {
  RouterLossesShape shape;
  bool balance, z, importance, switch_convention, unbiased;
  double weights[3];
  T grad_total;
  std::optional<Array<T>> lse, score_sums;
  std::optional<Array<int64_t>> counts;
  Array<int64_t> group_tokens;

  explicit Inputs(Bytes& bytes) : shape{0, bytes.size(0, 9), 1, bytes.flag()}, group_tokens(0) {
    const int64_t losses = bytes.integer(1, 7);  // of three, at least one
    balance = losses & 1;
    z = losses & 2;
    importance = losses & 4;
    switch_convention = bytes.flag();
    unbiased = bytes.flag();
    if (balance || importance) shape.experts = bytes.size(1, 70);
    // Several blocks of tokens, seldom.
    if (z)
      shape.tokens = bytes.integer(0, 31) == 31 ? bytes.integer(4000, 13000) : bytes.size(0, 90);
    const int64_t kind = bytes.kind(), sums_kind = bytes.kind(), scalar_kind = bytes.kind();
    const int64_t size = shape.groups * shape.experts;
    if (z) lse = bytes.numbers<T>(shape.tokens, kind);
    if (balance || importance) score_sums = bytes.numbers<T>(size, sums_kind);
    const int64_t fewest = bytes.flag() ? 0 : -3;  // the operator looks at no counts
    if (balance) counts = bytes.integers(size, fewest, 250);
    group_tokens = bytes.integers(shape.groups, fewest, bytes.flag() ? 250 : 1);
    const Array<double> scalars = bytes.numbers<double>(3, scalar_kind);
    std::copy(scalars.begin(), scalars.end(), weights);
    grad_total = bytes.numbers<T>(1, scalar_kind)[0];
  }
};

template <class T> struct Results {
  Array<T> total, values, grad_lse, grad_score_sums;

  Results(const Inputs<T>& in, Isa isa, double cut, unsigned char fill)
      : total(1, fill),
        values(3, fill),
        grad_lse(in.shape.tokens, fill),
        grad_score_sums(in.score_sums ? in.shape.groups * in.shape.experts : 0, fill) {
    const auto run = [&](const auto& params, int64_t begin, int64_t end) {
      TORCH_ROUTERS_PICK_ISA(isa, router_losses(params, begin, end));
    };
    const auto run_in_parts = [&](const auto& params, int64_t count) {
      in_parts(cut, count, [&](int64_t begin, int64_t end) { run(params, begin, end); });
    };
    const RouterLossesShape& shape = in.shape;
    const Array<double> squares(shape.blocks(), fill);
    const Array<double> slopes(1 + (in.score_sums ? shape.sets() * shape.experts : 0), fill);
    const bool in_blocks = shape.blocks() > 1;
    if (in_blocks) run_in_parts(LseSquares<T>{shape, data(in.lse), squares.data()}, shape.blocks());
    RouterLosses<T> p{shape,
                      data(in.score_sums),
                      data(in.counts),
                      in.group_tokens.data(),
                      data(in.lse),
                      in_blocks ? squares.data() : nullptr,
                      in.importance,
                      in.switch_convention,
                      in.unbiased,
                      in.balance ? in.weights[0] : 0,
                      in.z ? in.weights[1] : 0,
                      in.importance ? in.weights[2] : 0,
                      total.data(),
                      values.data(),
                      nullptr,
                      nullptr};
    run(p, 0, 1);
    p.total = p.values = nullptr;
    p.squares = nullptr;
    p.lse_slope = slopes.data();
    p.slopes = slopes.data() + 1;
    run(p, 0, 1);
    run_in_parts(
        RouterLossesBackward<T>{shape, &in.grad_total, data(in.lse), slopes.data(),
                                slopes.data() + 1, grad_lse.data(), grad_score_sums.data()},
        grad_lse.size() + grad_score_sums.size());
  }

  bool operator==(const Results&) const = default;
};

// What is within the bounds of rounding of another, given what was added up; or both are no number.
void expect_near(double actual, double expected, double size, double rounding, const char* what) {
  if (!std::isfinite(expected) || !(size < 1e30)) return;  // what overflows may do so elsewhere
  expect(std::abs(actual - expected) <= rounding * size + 1e-30, what);
}

// The losses by their formulas, and what the slopes have in common with them.
template <class T> void check_results(const Inputs<T>& in, const Results<T>& out) {
  const auto [tokens, groups, experts, per_group] = in.shape;
  const double rounding = sizeof(T) == 4 ? 1e-6 : 1e-12;
  const auto at_least_one = [](double x) { return std::max<double>(1, x); };
  double all = 0, filled = 0, squares = 0;
  for (const int64_t count : in.group_tokens) {
    all += static_cast<double>(count);
    filled += count > 0;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const double x = (*in.lse)[t];
    if (x != -HUGE_VAL) squares += x * x;
    expect(x != -HUGE_VAL || in.grad_total != in.grad_total || std::isinf(in.grad_total) ||
               out.grad_lse[t] == 0,
           "no gradient of minus infinity");
  }
  const double z = squares / at_least_one(all);
  expect_near(out.values[1], z, z, rounding, "the mean square of lse");
  expect(in.balance || out.values[0] == 0, "0 where no balance loss is asked for");
  expect(in.z || out.values[1] == 0, "0 where no z-loss is asked for");
  expect(in.importance || out.values[2] == 0, "0 where no importance loss is asked for");

  double balance = 0, size = 0;
  for (int64_t set = 0; in.balance && set < in.shape.sets(); ++set) {
    double slots = 0, dot = 0, dots = 0;
    const double set_tokens = per_group ? static_cast<double>(in.group_tokens[set]) : all;
    for (int64_t e = 0; e < experts; ++e) {
      double count = 0, score = 0, scores = 0;
      for (int64_t g = per_group ? set : 0; g < (per_group ? set + 1 : groups); ++g) {
        count += static_cast<double>((*in.counts)[g * experts + e]);
        score += (*in.score_sums)[g * experts + e];
        scores += std::abs(double{(*in.score_sums)[g * experts + e]});
      }
      slots += count;
      dot += count * score;
      dots += std::abs(count) * scores;
    }
    const double scale = static_cast<double>(experts) /
                         (at_least_one(in.switch_convention ? set_tokens : slots) *
                          at_least_one(set_tokens) * (per_group ? at_least_one(filled) : 1));
    balance += scale * dot;
    size += scale * dots;
  }
  if (in.balance) expect_near(out.values[0], balance, size, rounding, "the balance loss");

  const Array<T>& grads = out.grad_score_sums;
  for (int64_t i = experts; !per_group && i < grads.size(); ++i)
    expect(std::isnan(grads[i]) || grads[i] == grads[i - experts], "one slope for all groups");

  // The importance loss is 0 for equal sums, and at most what one expert alone has.
  const double importance = out.values[2];
  const auto is_a_sum = [](T x) { return x >= T(1e-3) && x < T(1e9); };
  if (in.importance && groups > 0 &&
      std::all_of(in.score_sums->begin(), in.score_sums->end(), is_a_sum)) {
    const double most = static_cast<double>(in.unbiased ? experts : experts - 1);
    expect(0 <= importance && importance <= 1.001 * most, "an importance loss in its bounds");
  }
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_routers::fuzz;
  Bytes bytes(data, size);
  bytes.pick_compute_type([&]<class T>() {
    run_twice<Inputs<T>, Results<T>>(
        bytes, [](const auto& in, const auto& out) { check_results(in, out); });
  });
  return 0;
}
