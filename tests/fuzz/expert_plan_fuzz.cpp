#include "bytes.h"
#include "expert_plan/expert_plan_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class T> struct Inputs {
  static constexpr bool kByIndex = std::is_same_v<T, int64_t>;
  int64_t tokens, experts, slots, max_rows;
  Array<T> experts_of;

  explicit Inputs(Bytes& bytes)
      : tokens(bytes.size(0, 80)),
        experts(bytes.size(1, 150)),
        slots(kByIndex ? bytes.size(0, 20) : experts),
        max_rows(bytes.flag() ? size() : bytes.integer(0, size() + 9)),
        experts_of(0) {
    if constexpr (kByIndex) {
      const int64_t kind = bytes.integer(0, 7);  // each slot with an expert; some without; any bits
      experts_of = bytes.integers(size(), kind % 2 - 1, experts - 1);
      if (kind == 7)
        for (int64_t& index : experts_of)
          if (bytes.integer(0, 7) == 7) index = any_integer(bytes);
    } else {
      experts_of = bytes.template numbers<T>(size(), bytes.kind());
      const Array<bool> zero = bytes.flags(bytes.flag() ? size() : 0);
      for (int64_t i = 0; i < zero.size(); ++i)
        if (zero[i]) store(&experts_of[i], 0);
    }
  }
  static int64_t any_integer(Bytes& bytes) {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    return bytes.flag() ? bytes.integer(-kMost, -1) : bytes.integer(0, kMost - 1);
  }
  int64_t size() const { return tokens * slots; }

  int64_t expert_of(int64_t slot) const {
    if constexpr (kByIndex)
      return experts_of[slot];
    else
      return load(experts_of[slot]) == 0 ? -1 : slot % experts;
  }
  int64_t out_of_range() const {
    int64_t count = 0;
    for (int64_t i = 0; i < size(); ++i) count += expert_of(i) < -1 || expert_of(i) >= experts;
    return count;
  }
};

template <class T> struct Results {
  int64_t out_of_range = 0;  // then there is no plan
  Array<int64_t> order, inverse, counts, offsets, dropped;

  Results(const Inputs<T>& in, Isa isa, int64_t parts, double cut, unsigned char fill)
      : order(in.max_rows, fill),
        inverse(in.size(), fill),
        counts(in.experts, fill),
        offsets(in.experts + 1, fill),
        dropped(1, fill) {
    const Array<int64_t> bins(parts * (in.experts + 2), fill);
    const ExpertPlan<T> p{
        {in.tokens, in.slots, in.experts, in.max_rows, parts, bins.data(), order.data(),
         inverse.data(), counts.data(), offsets.data(), dropped.data()},
        in.experts_of.data()};
    in_parts(cut, parts, [&](int64_t begin, int64_t end) {
      TORCH_ROUTERS_PICK_ISA(isa, count_slots(p, begin, end));
    });
    for (int64_t part = 0; in.kByIndex && part < parts; ++part)
      out_of_range += p.out_of_range(part);
    if (out_of_range) return;
    TORCH_ROUTERS_PICK_ISA(isa, place_experts(p));
    in_parts(cut, parts, [&](int64_t begin, int64_t end) {
      TORCH_ROUTERS_PICK_ISA(isa, place_slots(p, begin, end));
    });
  }
};

template <class T> void check_results(const Inputs<T>& in, const Results<T>& out) {
  Array<int64_t> live(in.experts), next(in.experts);
  for (int64_t slot = 0; slot < in.size(); ++slot)
    if (in.expert_of(slot) >= 0) ++live[in.expert_of(slot)];
  expect(out.offsets[0] == 0, "offsets from 0");
  int64_t all = 0;
  for (int64_t e = 0; e < in.experts; ++e) {
    all += live[e];
    expect(out.offsets[e + 1] == std::min(all, in.max_rows), "rows as long as there are any");
    expect(out.counts[e] == out.offsets[e + 1] - out.offsets[e], "counts of the rows");
    next[e] = out.offsets[e];
  }
  const int64_t rows = out.offsets[in.experts];
  expect(out.dropped[0] == all - rows, "as dropped what has no row");
  for (int64_t slot = 0; slot < in.size(); ++slot) {
    const int64_t e = in.expert_of(slot), row = out.inverse[slot];
    if (e < 0 || next[e] == out.offsets[e + 1]) {
      expect(row == -1, "no row");
    } else {
      expect(row == next[e]++, "the rows of an expert in the order of its slots");
      expect(out.order[row] == slot, "order and inverse that are inverse");
    }
  }
  for (int64_t row = rows; row < in.max_rows; ++row)
    expect(out.order[row] == -1, "no slots behind the last row");
}

template <class T> void fuzz_expert_plan(Bytes& bytes) {
  const Isa other = bytes.any_isa();
  const double cut = bytes.share();
  const int64_t parts = bytes.size(1, 40);
  const Inputs<T> in(bytes);
  const Results<T> one(in, Isa::Default, 1, 1, kFills[0]), out(in, other, parts, cut, kFills[1]);
  if constexpr (in.kByIndex) {
    const int64_t wrong = in.out_of_range();
    expect(one.out_of_range == wrong && out.out_of_range == wrong, "indices out of range");
    if (wrong) return;
  }
  check_results(in, one);
  check_results(in, out);  // which leave no choice
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_routers::fuzz;
  Bytes bytes(data, size);
  if (bytes.flag())
    fuzz_expert_plan<std::int64_t>(bytes);
  else
    bytes.pick_type([&]<class T> { fuzz_expert_plan<T>(bytes); });
  return 0;
}
