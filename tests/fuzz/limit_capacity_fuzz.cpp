#include "bytes.h"
#include "common/philox.h"
#include "limit_capacity_problem.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class T> std::vector<T> to_vector(const Array<T>& array) {
  return {array.begin(), array.end()};
}

// Of plans the operator checks little, hence most of what is said of them need not be: slots may be
// of several experts, rows of no slot, and what is behind the last expert's rows is anything.
template <class T> CapacityProblem<T> any_problem(Bytes& bytes) {
  CapacityProblem<T> p{};
  CapacityShape& s = p.shape;
  s.tokens = bytes.size(0, 60);
  s.slots = bytes.size(0, 12);
  if (bytes.integer(0, 31) == 31) s.slots = bytes.integer(257, 300);  // positions of two digits
  if (s.slots > 12) s.tokens = std::min<int64_t>(s.tokens, 2);
  s.experts = bytes.size(1, 20);
  s.groups = bytes.size(1, 9);
  p.policy = static_cast<DropPolicy>(bytes.integer(0, 3));
  const bool consistent = bytes.flag();

  const int64_t slots = s.all_slots();
  const Array<int64_t> expert = bytes.integers(slots, -1, s.experts - 1);
  p.inverse.assign(slots, -1);
  p.offsets = {0};
  for (int64_t e = 0; e < s.experts; ++e) {
    const Array<bool> also = bytes.flags(consistent ? 0 : slots);
    for (int64_t slot = 0; slot < slots; ++slot) {
      if (expert[slot] != e && (consistent || !also[slot])) continue;
      p.inverse[slot] = static_cast<int64_t>(p.order.size());
      p.order.push_back(slot);
    }
    p.offsets.push_back(static_cast<int64_t>(p.order.size()));
  }
  for (int64_t i = bytes.size(0, 20); i > 0; --i)
    p.order.push_back(consistent ? -1 : bytes.integer(-5, 2 * slots));
  s.rows = static_cast<int64_t>(p.order.size());
  if (!consistent && bytes.flag()) p.inverse = to_vector(bytes.integers(slots, -1, s.rows - 1));

  for (int64_t g = 0; g < s.groups; ++g)
    p.capacity.push_back(bytes.integer(0, 15) ? bytes.size(0, 200)
                                              : std::numeric_limits<int64_t>::max());
  if (s.groups > 1 || bytes.flag()) p.group_offsets = to_vector(bytes.offsets(s.groups, s.tokens));
  const int64_t kind = bytes.kind();
  if (p.policy == DropPolicy::Weight) p.scores = to_vector(bytes.numbers<T>(slots, kind));
  if (p.policy == DropPolicy::Priority) p.scores = to_vector(bytes.numbers<T>(s.tokens, kind));
  if (bytes.flag()) {
    const Array<double> any = bytes.numbers<double>(s.tokens, 0);
    for (const double id : any) p.row_ids.push_back(bit_cast<int64_t>(id));
  }
  p.seed = bit_cast<int64_t>(bytes.numbers<double>(1, 0)[0]);
  p.dropped = bytes.integer(0, 1000);
  return p;
}

// What is not written holds other bytes in each of the two runs.
template <int kRun> struct OfRun {
  template <class T> struct Memory : HostArray<T> {
    explicit Memory(const std::vector<T>& values) : HostArray<T>(values) {}
    explicit Memory(std::size_t size) : HostArray<T>(size) {
      if (size) std::memset(static_cast<void*>(this->data()), kFills[kRun], size * sizeof(T));
    }
  };
};

template <int kRun, class T>
CapacityResults results(const CapacityProblem<T>& p, Isa isa, double cut) {
  return limit_capacity_steps<OfRun<kRun>::template Memory>(
      p, [&](const auto& params, int64_t count) {
        in_parts(cut, count, [&](int64_t begin, int64_t end) {
          TORCH_ROUTERS_PICK_ISA(isa, limit_capacity(params, begin, end));
        });
      });
}

template <class T> struct Kept {
  const CapacityProblem<T>& p;
  int64_t expert;

  // Whether the slot of row a is to be kept before that of row b, whichever row is first.
  bool operator()(int64_t a, int64_t b) const {
    const int64_t i = p.order[a], j = p.order[b], slots = p.shape.slots;
    switch (p.policy) {
      case DropPolicy::Position: return i % slots < j % slots;
      case DropPolicy::Weight: return is_larger(load(p.scores[i]), load(p.scores[j]));
      case DropPolicy::Priority:
        return is_larger(load(p.scores[i / slots]), load(p.scores[j / slots]));
      default: return random(i / slots) < random(j / slots);
    }
  }
  static bool is_larger(Compute<T> x, Compute<T> y) { return y == y && (x != x || x > y); }
  std::uint64_t random(int64_t token) const {
    const int64_t id = p.row_ids.empty() ? token : p.row_ids[token];
    const RandomWords words = random_words(p.seed, Purpose::Capacity, id, expert);
    return std::uint64_t{words.words[1]} << 32 | words.words[0];
  }
};

template <class T> void check_results(const CapacityProblem<T>& p, const CapacityResults& out) {
  std::vector<int64_t> new_rows(p.shape.rows, -1);
  int64_t after = 0;
  const int64_t before = p.offsets.back();
  for (int64_t e = 0; e < p.shape.experts; ++e) {
    expect(out.offsets[e] == after, "the first row of each expert");
    int64_t row = p.offsets[e];
    for (int64_t g = 0; g < p.shape.groups; ++g) {
      const int64_t past = p.group_offsets.empty() ? p.shape.tokens : p.group_offsets[g + 1];
      std::vector<int64_t> rows;
      while (row < p.offsets[e + 1] && p.order[row] < past * p.shape.slots) rows.push_back(row++);
      std::stable_sort(rows.begin(), rows.end(), Kept<T>{p, e});
      rows.resize(std::min<int64_t>(rows.size(), p.capacity[g]));
      std::sort(rows.begin(), rows.end());
      for (const int64_t kept : rows) {
        expect(out.order[after] == p.order[kept], "the best rows, in their old order");
        new_rows[kept] = after++;
      }
    }
    expect(out.counts[e] == after - out.offsets[e], "counts of the kept rows");
  }
  expect(out.offsets[p.shape.experts] == after, "the end of the rows");
  expect(out.dropped[0] == p.dropped + before - after, "as dropped all that is not kept");
  for (int64_t row = after; row < p.shape.rows; ++row)
    expect(out.order[row] == -1, "no slots behind the last row");
  for (int64_t slot = 0; slot < p.shape.all_slots(); ++slot) {
    const int64_t row = p.inverse[slot];
    const bool moves = 0 <= row && row < before;
    expect(out.inverse[slot] == (before == after ? row
                                 : moves         ? new_rows[row]
                                                 : -1),
           "the new row of each slot");
  }
}

template <class T> void fuzz_limit_capacity(Bytes& bytes) {
  const Isa other = bytes.any_isa();
  const double cut = bytes.share();
  const CapacityProblem<T> p = any_problem<T>(bytes);
  const CapacityResults out = results<0>(p, Isa::Default, 1);
  expect(out == results<1>(p, other, cut), "equal results of both runs");
  check_results(p, out);
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_routers::fuzz;
  Bytes bytes(data, size);
  bytes.pick_type([&]<class T> { fuzz_limit_capacity<T>(bytes); });
  return 0;
}
