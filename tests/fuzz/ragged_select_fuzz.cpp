#include "bytes.h"
#include "ragged_select/ragged_select_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class T> struct Inputs {
  int64_t tokens, experts, slots;
  RaggedRule rule;
  double top_p;
  Crossing crossing;
  int64_t least, steps;
  Array<T> logits;
  Array<int64_t> order;
  Array<double> thresholds;
  Array<int64_t> counts;

  explicit Inputs(Bytes& bytes)
      : tokens(bytes.size(0, 40)),
        experts(bytes.size(1, bytes.integer(0, 3) ? 70 : 600)),
        slots(bytes.size(0, 12)),
        rule(static_cast<RaggedRule>(bytes.integer(0, 3))),
        top_p(1.2 * bytes.share()),
        crossing(static_cast<Crossing>(bytes.integer(0, 2))),
        least(bytes.integer(0, 15)),
        steps(bytes.size(0, 12)),
        logits(bytes.numbers<T>(tokens * experts, bytes.kind())),
        order(bytes.integers(tokens * slots, -1, experts - 1)),
        thresholds(bytes.numbers<double>(steps, bytes.kind())),
        counts(bytes.integers(steps + 1, -1, 15)) {}
};

template <class T> struct Results {
  Array<int64_t> indices;

  Results(const Inputs<T>& in, Isa isa, double cut, unsigned char fill)
      : indices(in.tokens * in.slots, fill) {
    const RaggedSelect<T> params{in.tokens,        in.experts,           in.slots,
                                 in.logits.data(), in.order.data(),      in.rule,
                                 in.top_p,         in.crossing,          in.least,
                                 in.steps,         in.thresholds.data(), in.counts.data(),
                                 indices.data()};
    in_parts(cut, in.tokens, [&](int64_t begin, int64_t end) {
      TORCH_ROUTERS_PICK_ISA(isa, ragged_select(params, begin, end));
    });
  }

  bool operator==(const Results&) const = default;
};

// The first ones of the order, `least` of them at least.
template <class T> void check_results(const Inputs<T>& in, const Results<T>& out) {
  for (int64_t t = 0; t < in.tokens; ++t) {
    const int64_t* order = in.order.data() + t * in.slots;
    const int64_t* indices = out.indices.data() + t * in.slots;
    bool goes_on = true;
    for (int64_t j = 0; j < in.slots; ++j) {
      goes_on = goes_on && indices[j] == order[j];
      expect(goes_on || indices[j] == -1, "nothing behind the last expert");
      expect(j >= in.least || goes_on, "as many experts as there are in any case");
    }
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
