// The CUDA kernels against the CPU kernels: the same experts and counts, and the same weights,
// statistics and gradients within a few units in the last place.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/row.h"
#include "device_array.h"
#include "gate/gate_kernel.h"
#include "gate/gate_math.h"

namespace torch_routers {
namespace {

using std::int64_t;
template <class T> using Values = std::vector<T>;
using Bytes = std::vector<unsigned char>;

// ---- inputs ------------------------------------------------------------------------------------

struct Case {
  int64_t tokens, experts, slots;
  std::string logits = "normal";  // see logit()
  std::string groups = "none";    // see offsets()
  std::string masked = "none";    // or some, all
  bool given = false;             // the indices; else they are selected
  // How they are selected:
  Score score = Score::Softmax;
  std::string bias = "none";  // or any kind of logits, or "cancels": see Inputs
  int64_t expert_groups = 0, kept_groups = 1, group_best = 1;
  bool top_k = false;  // slots per token, some of them beyond what there is
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  constexpr const char* kScores[] = {"softmax", "sigmoid", "softplus", "identity"};
  out << c.tokens << "x" << c.experts << (c.given ? "_given" : "_top") << c.slots << "_"
      << c.logits;
  if (c.groups != "none") out << "_groups_" << c.groups;
  if (c.masked != "none") out << "_masked_" << c.masked;
  if (c.bias != "none") out << "_bias_" << c.bias;
  if (c.expert_groups)
    out << "_" << c.kept_groups << "_of_" << c.expert_groups << "_by_" << c.group_best;
  if (c.bias != "none" || c.group_best > 1) out << "_" << kScores[static_cast<int64_t>(c.score)];
  if (c.top_k) out << "_top_k";
  return out;
}

double logit(const std::string& kind, std::mt19937& random) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double x = std::normal_distribution<double>()(random);
  if (kind == "ties") return std::round(x);  // -0 and 0 among them
  if (kind == "equal") return 1;
  if (kind == "masked") return random() % 4 ? -kInfinity : x;
  if (kind == "infinite") return random() % 16 ? x : x > 0 ? kInfinity : -kInfinity;
  if (kind == "nan") return random() % 16 ? x : std::copysign(std::nan(""), x);
  if (kind == "extreme") return 80 * x;
  return x;
}

template <class S>
Values<S> draw(int64_t size, const std::string& kind, std::mt19937& random) {
  Values<S> values(size);
  for (S& value : values) store(&value, static_cast<Compute<S>>(logit(kind, random)));
  return values;
}

Values<int64_t> offsets(const std::string& kind, int64_t tokens) {
  const auto at_most = [&](int64_t token) { return std::min(token, tokens); };
  if (kind == "none") return {};
  if (kind == "one") return {0, tokens};
  if (kind == "blocks") return {0, at_most(64), at_most(128), tokens};
  if (kind == "uneven")  // empty ones first, amid and last; some lie in one block, one in several
    return {0, 0, at_most(3), at_most(3), at_most(3), at_most(10), at_most(70), tokens, tokens};
  Values<int64_t> each;
  for (int64_t t = 0; t <= tokens; ++t) each.push_back(t);
  return each;
}

template <class S> struct Inputs {
  using C = Compute<S>;
  GateShape shape;
  Values<S> logits;
  Bytes valid;
  Values<int64_t> offsets, indices, token_top_k;
  Values<C> grad_weights, grad_lse, grad_score_sums, bias;
  GateSelection<C> selection;  // but for the bias
  Score score;

  explicit Inputs(const Case& c)
      : selection{nullptr, c.expert_groups, c.kept_groups, c.group_best}, score(c.score) {
    std::mt19937 random(static_cast<unsigned>(c.tokens + c.experts));
    offsets = torch_routers::offsets(c.groups, c.tokens);
    shape = {c.tokens, c.experts, c.slots,
             offsets.empty() ? 1 : static_cast<int64_t>(offsets.size()) - 1};
    logits = draw<S>(c.tokens * c.experts, c.logits, random);
    if (c.masked != "none") {
      for (int64_t t = 0; t < c.tokens; ++t) valid.push_back(c.masked == "some" && random() % 3);
      for (int64_t i = 0; i < c.tokens * c.experts; ++i)
        if (!valid[i / c.experts]) store(&logits[i], std::numeric_limits<C>::quiet_NaN());
    }
    for (int64_t i = 0; c.given && i < c.tokens * c.slots; ++i)
      indices.push_back(static_cast<int64_t>(random() % (c.experts + 1)) - 1);
    for (int64_t t = 0; c.top_k && t < c.tokens; ++t)
      token_top_k.push_back(static_cast<int64_t>(random() % (c.slots + 1)));
    grad_weights = draw<C>(c.tokens * c.slots, "normal", random);
    grad_lse = draw<C>(c.tokens, "normal", random);
    grad_score_sums = draw<C>(shape.groups * c.experts, "normal", random);
    if (c.bias == "cancels") {
      set_canceling_bias(c);
    } else if (c.bias != "none") {
      bias = draw<C>(c.experts, c.bias, random);
    }
    // Of no consequence: the gradient of no slot, and where all logits are -infinity that of lse.
    for (std::size_t i = 0; i < indices.size(); ++i)
      if (indices[i] == -1) grad_weights[i] = std::numeric_limits<C>::quiet_NaN();
    for (int64_t t = 1; c.logits == "masked" && t < c.tokens; t += 2)
      grad_lse[t] = -std::numeric_limits<C>::infinity();
  }

  // All scores + bias are 0 in the first row, and so are those of the next, which equal it: the
  // last bit of a score decides.
  void set_canceling_bias(const Case& c) {
    for (int64_t i = c.experts; i < c.tokens * c.experts; ++i) logits[i] = logits[i % c.experts];
    Values<C> x;
    for (int64_t e = 0; e < c.experts; ++e) x.push_back(load(logits[e]));
    Softmax<C> parts;
    parts.set_max(*std::max_element(x.begin(), x.end()));
    parts.set_sum(sum_row<C>(c.experts, [&](int64_t e) { return own_exp(x[e] - parts.max); }));
    for (int64_t e = 0; e < c.experts; ++e)
      bias.push_back(
          -(c.score == Score::Softmax ? parts.probability(x[e]) : score_of(c.score, x[e])));
  }
};

struct Options {
  Score score;
  bool renormalize;
  double epsilon, scale;
  bool statistics, grad_weights, grad_lse, grad_score_sums;
};

// ---- results -----------------------------------------------------------------------------------

template <class S> struct Results {
  using C = Compute<S>;
  Values<C> weights;
  Values<int64_t> indices;
  Values<C> lse, score_sums;
  Values<int64_t> counts, group_tokens;
  Values<S> grad_logits;
};

// The CPU's counterpart of DeviceArray.
template <class T> class HostArray {
 public:
  explicit HostArray(std::size_t size) : values_(size) {
    std::fill_n(reinterpret_cast<unsigned char*>(values_.data()), size * sizeof(T), 0xfe);
  }
  explicit HostArray(const Values<T>& values) : values_(values) {}
  T* data() const { return const_cast<T*>(values_.data()); }
  Values<T> to_host() const { return values_; }

 private:
  Values<T> values_;
};

// The inputs of selection and weights, on a device.
template <template <class> class Array, class S> struct OnDevice {
  using C = Compute<S>;
  Array<S> logits;
  Array<unsigned char> valid;
  Array<int64_t> offsets, token_top_k, indices;
  Array<C> bias;
  Gate<S> gate{};

  explicit OnDevice(const Inputs<S>& in)
      : logits(in.logits),
        valid(in.valid),
        offsets(in.offsets),
        token_top_k(in.token_top_k),
        indices(in.indices.empty() ? Array<int64_t>(in.shape.tokens * in.shape.slots).to_host()
                                   : in.indices),
        bias(in.bias) {
    static_cast<GateShape&>(gate) = in.shape;
    gate.logits = logits.data();
    if (!in.valid.empty()) gate.valid = reinterpret_cast<const bool*>(valid.data());
    if (!in.offsets.empty()) gate.group_offsets = offsets.data();
    if (!in.token_top_k.empty()) gate.token_top_k = token_top_k.data();
    gate.indices = indices.data();
    gate.select = in.indices.empty();
    gate.selection = in.selection;
    if (!in.bias.empty()) gate.selection.bias = bias.data();
    gate.weighing.score = in.score;
  }
};

// `run(params, count)` runs one of the three.
template <template <class> class Array, class S, class Run>
Results<S> run(const Inputs<S>& in, const Options& o, const Run& run) {
  using C = Compute<S>;
  const GateShape& shape = in.shape;
  const auto null_or = [](bool wanted, const auto& array) {
    return wanted ? array.data() : nullptr;
  };
  OnDevice<Array, S> device(in);
  const Array<C> weights(shape.tokens * shape.slots), lse(o.statistics ? shape.tokens : 0);
  const Array<C> scratch(shape.blocks() * shape.scratch_size());
  const Array<C> partial_sums(shape.segments() * shape.experts);
  const Array<int64_t> partial_counts(shape.segments() * shape.experts);
  const Array<int64_t> partial_tokens(shape.segments());
  Gate<S>& gate = device.gate;
  gate.weights = weights.data();
  gate.lse = null_or(o.statistics, lse);
  gate.partial_sums = null_or(o.statistics, partial_sums);
  gate.partial_counts = partial_counts.data();
  gate.partial_tokens = partial_tokens.data();
  gate.scratch = null_or(shape.scratch_size() > 0, scratch);
  gate.weighing = {o.score, o.renormalize, static_cast<C>(o.epsilon), static_cast<C>(o.scale)};
  run(gate, shape.blocks());

  const Array<C> score_sums(o.statistics ? shape.groups * shape.experts : 0);
  const Array<int64_t> counts(shape.groups * shape.experts), group_tokens(shape.groups);
  run(GateCombine<C>{shape, gate.group_offsets, partial_sums.data(), partial_counts.data(),
                     partial_tokens.data(), null_or(o.statistics, score_sums), counts.data(),
                     group_tokens.data()},
      shape.groups);

  const Array<C> grad_weights(in.grad_weights), grad_lse(in.grad_lse),
      grad_score_sums(in.grad_score_sums);
  const Array<S> grad_logits(in.logits.size());
  run(GateBackward<S>{shape, null_or(o.grad_weights, grad_weights), null_or(o.grad_lse, grad_lse),
                      null_or(o.grad_score_sums, grad_score_sums), gate.logits, gate.valid,
                      gate.group_offsets, gate.indices, grad_logits.data(), gate.scratch,
                      gate.weighing},
      shape.blocks());
  return {weights.to_host(), device.indices.to_host(), lse.to_host(),        score_sums.to_host(),
          counts.to_host(),  group_tokens.to_host(),   grad_logits.to_host()};
}

constexpr auto kOnCpu = [](const auto& p, int64_t count) { gate_cpu(p, 0, count); };
constexpr auto kOnCuda = [](const auto& p, int64_t) { gate_cuda(p, nullptr); };

template <class S> Results<S> run_cpu(const Inputs<S>& in, const Options& o) {
  return run<HostArray>(in, o, kOnCpu);
}
template <class S> Results<S> run_cuda(const Inputs<S>& in, const Options& o) {
  return run<DeviceArray>(in, o, kOnCuda);
}

// Indices alone.
template <template <class> class Array, class S, class Run>
Values<int64_t> select(const Inputs<S>& in, const Run& run) {
  OnDevice<Array, S> device(in);
  const Array<Compute<S>> scratch(in.shape.blocks() * in.shape.scratch_size());
  if (in.shape.scratch_size() > 0) device.gate.scratch = scratch.data();
  run(device.gate, in.shape.blocks());
  return device.indices.to_host();
}

// ---- comparison --------------------------------------------------------------------------------

// The two sum over experts, slots and the tokens of a block in different orders.
template <class C> double tolerance(const GateShape& shape) {
  const auto terms = static_cast<double>(32 + shape.experts / 4 + 4 * shape.slots);
  return terms * std::numeric_limits<C>::epsilon();
}

template <class C> bool close(C actual, C expected, double tolerance) {
  return actual == expected || (std::isnan(actual) && std::isnan(expected)) ||
         std::abs(actual - expected) <= tolerance * (std::abs(expected) + C(0.1));
}

template <class S>
void expect_close(const char* what, const Values<S>& actual, const Values<S>& expected,
                  double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i)
    if (!close(load(actual[i]), load(expected[i]), tolerance)) {
      ADD_FAILURE() << what << " at " << i << ": " << load(actual[i]) << ", on the CPU "
                    << load(expected[i]);
      return;
    }
}

// Of gradients of logits, which are rounded to S: to a neighbour, if the sums are between two.
template <class S> double rounding() {
  return std::is_same_v<S, BFloat16> ? 0x1p-7 : std::is_same_v<S, Float16> ? 0x1p-10 : 0;
}

template <class S> void expect_cuda_equals_cpu(const Inputs<S>& in, const Options& o) {
  SCOPED_TRACE(testing::Message() << "score " << static_cast<int64_t>(o.score) << " renormalize "
                                  << o.renormalize << " epsilon " << o.epsilon << " statistics "
                                  << o.statistics << " gradients " << o.grad_weights << o.grad_lse
                                  << o.grad_score_sums);
  const Results<S> cpu = run_cpu(in, o), cuda = run_cuda(in, o);
  const double limit = tolerance<Compute<S>>(in.shape);
  EXPECT_EQ(cuda.indices, cpu.indices);
  EXPECT_EQ(cuda.counts, cpu.counts);
  EXPECT_EQ(cuda.group_tokens, cpu.group_tokens);
  expect_close("weights", cuda.weights, cpu.weights, limit);
  expect_close("lse", cuda.lse, cpu.lse, limit);
  expect_close("score_sums", cuda.score_sums, cpu.score_sums, limit);
  expect_close("grad_logits", cuda.grad_logits, cpu.grad_logits, limit + rounding<S>());
}

// ---- tests -------------------------------------------------------------------------------------

constexpr Options kAll{Score::Softmax, false, 0, 1, true, true, true, true};
// Float has all of them, other types every other; where there are many tokens, the first two.
constexpr int kNumOptions = 7;
constexpr Options kOptions[kNumOptions] = {
    kAll,
    {Score::Sigmoid, true, 1e-20, 2.5, true, true, true, true},
    {Score::Softmax, true, 0, 2.5, false, true, false, false},
    {Score::Softmax, true, 0, 1, true, true, true, true},
    {Score::SqrtSoftplus, false, 0, 1, true, true, false, true},
    {Score::Softmax, true, 0.25, 0.5, false, true, false, false},
    {Score::SqrtSoftplus, true, 0, 1, false, true, true, false},
};

class GateCuda : public testing::TestWithParam<Case> {
 protected:
  template <class S> void compare() {
    const Inputs<S> in(GetParam());
    const bool is_float = std::is_same_v<S, float>, is_bfloat16 = std::is_same_v<S, BFloat16>;
    for (int i = 0; i < (in.shape.tokens > 60 ? 2 : kNumOptions); ++i)
      if (is_float || i % 2 == is_bfloat16) expect_cuda_equals_cpu(in, kOptions[i]);
  }
};
TEST_P(GateCuda, Float) { compare<float>(); }
TEST_P(GateCuda, Double) { compare<double>(); }
TEST_P(GateCuda, BFloat16) { compare<BFloat16>(); }
TEST_P(GateCuda, Float16) { compare<Float16>(); }

INSTANTIATE_TEST_SUITE_P(
    Cases, GateCuda,
    testing::Values(
        // tokens, groups and masks
        Case{0, 8, 2}, Case{0, 8, 2, "normal", "uneven"}, Case{1, 1, 1}, Case{3, 2, 1},
        Case{63, 8, 2, "ties", "one"}, Case{64, 8, 2, "masked", "blocks", "some"},
        Case{65, 7, 2, "ties", "each", "some"}, Case{70, 8, 1, "normal", "none", "all"},
        Case{200, 8, 2, "normal", "uneven"}, Case{200, 33, 3, "ties", "uneven", "some", true},
        Case{520, 2, 1, "normal", "none", "some"},
        // experts and slots
        Case{5, 7, 7}, Case{9, 8, 2, "ties"}, Case{4, 32, 32, "masked"}, Case{5, 33, 33},
        Case{7, 64, 8, "ties", "none", "none", true}, Case{5, 96, 8, "infinite"},
        Case{3, 128, 32, "masked"}, Case{5, 250, 8, "ties"}, Case{5, 256, 8, "masked"},
        Case{3, 256, 8, "extreme"}, Case{3, 257, 9, "infinite"}, Case{3, 512, 8, "nan"},
        Case{2, 1000, 8, "ties"}, Case{2, 1024, 32},
        Case{2, 1024, 4, "normal", "none", "none", true},
        // beyond what fits into registers
        Case{66, 40, 33, "ties", "uneven", "some", true}, Case{3, 40, 33, "ties", "one", "some"},
        Case{3, 64, 64, "masked"}, Case{9, 3, 40, "masked", "none", "none", true},
        Case{5, 64, 50, "normal", "none", "none", true}, Case{3, 40, 40, "nan"},
        Case{2, 1025, 8, "ties"}, Case{2, 1500, 4, "infinite", "none", "some", true}),
    testing::PrintToStringParamName());

class GateCudaSelect : public testing::TestWithParam<Case> {
 protected:
  template <class S> void compare() {
    const Inputs<S> in(GetParam());
    EXPECT_EQ(select<DeviceArray>(in, kOnCuda), select<HostArray>(in, kOnCpu)) << "cuda.indices";
    if (in.score == Score::Identity || in.shape.experts > 2000) return;
    expect_cuda_equals_cpu(in, {in.score, true, 1e-20, 1, true, true, false, false});
  }
};
TEST_P(GateCudaSelect, Float) { compare<float>(); }
TEST_P(GateCudaSelect, Double) { compare<double>(); }
TEST_P(GateCudaSelect, BFloat16) { compare<BFloat16>(); }
TEST_P(GateCudaSelect, Float16) { compare<Float16>(); }

// Of a case with logits, bias, score, groups of experts.
Case by(Case c, Score score, const std::string& bias, int64_t expert_groups = 0,
        int64_t kept_groups = 1, int64_t group_best = 1) {
  c.score = score;
  c.bias = bias;
  c.expert_groups = expert_groups;
  c.kept_groups = kept_groups;
  c.group_best = group_best;
  return c;
}
Case with_top_k(Case c) {
  c.top_k = true;
  return c;
}
constexpr Score kSoftmax = Score::Softmax, kSigmoid = Score::Sigmoid,
                kSoftplus = Score::SqrtSoftplus, kIdentity = Score::Identity;

INSTANTIATE_TEST_SUITE_P(
    Cases, GateCudaSelect,
    testing::Values(
        // logits alone
        Case{5, 7, 3}, Case{70, 64, 8, "ties", "none", "some"}, Case{3, 1024, 32, "nan"},
        with_top_k({70, 8, 4, "ties", "uneven", "some"}), with_top_k({9, 300, 9, "masked"}),
        // a bias
        by({4, 8, 2}, kSoftmax, "normal"), by({3, 19, 4}, kSoftmax, "cancels"),
        by({3, 256, 8}, kSoftmax, "cancels"), by({3, 33, 32}, kSigmoid, "cancels"),
        by({3, 96, 8}, kSoftplus, "cancels"), by({5, 64, 6, "ties"}, kIdentity, "ties"),
        by({4, 65, 8, "nan"}, kSoftmax, "normal"), by({4, 40, 8, "infinite"}, kSigmoid, "masked"),
        by({4, 40, 8, "masked"}, kSoftmax, "infinite"),
        with_top_k(by({66, 32, 8, "extreme", "none", "some"}, kSigmoid, "normal")),
        // groups of experts
        by({5, 8, 2}, kSoftmax, "none", 4, 2), by({5, 12, 4, "ties"}, kSigmoid, "none", 6, 2, 2),
        by({70, 64, 8, "masked", "none", "some"}, kSoftmax, "none", 8, 3, 2),
        by({9, 64, 8, "masked"}, kSoftmax, "none", 8, 1),
        by({5, 256, 8, "ties"}, kSigmoid, "ties", 8, 4, 2),
        by({4, 256, 8, "nan"}, kSigmoid, "normal", 8, 4, 2),
        by({4, 1000, 8, "equal"}, kSoftplus, "none", 500, 4, 2),
        by({4, 160, 6}, kSoftmax, "cancels", 8, 3),
        by({3, 48, 32, "ties"}, kIdentity, "none", 6, 4),
        with_top_k(by({9, 1024, 8, "ties"}, kSigmoid, "ties", 16, 4, 3)),
        // long rows
        Case{3, 40, 33, "ties"}, Case{3, 64, 64, "equal"}, Case{3, 257, 250, "nan"},
        Case{2, 1025, 1, "equal"}, Case{2, 1025, 1025, "ties"}, Case{2, 1500, 700, "masked"},
        Case{2, 2000, 100, "infinite", "none", "some"}, Case{3, 3000, 33},
        with_top_k({5, 1030, 40, "ties", "none", "some"}), by({3, 1100, 40}, kSoftmax, "cancels"),
        by({2, 1100, 8, "nan"}, kSigmoid, "normal"),
        by({2, 1200, 50, "ties"}, kSigmoid, "ties", 8, 3, 2),
        by({2, 2100, 8, "masked"}, kSoftmax, "none", 1050, 700, 2),
        by({2, 1040, 33, "masked"}, kSoftplus, "none", 20, 7, 52)),
    testing::PrintToStringParamName());

TEST(GateCuda, RowsSoLongThatAnIndexHasThreeBytes) {
  for (const char* logits : {"normal", "ties"}) {
    const Inputs<float> in({1, 70000, 40, logits});
    EXPECT_EQ(select<DeviceArray>(in, kOnCuda), select<HostArray>(in, kOnCpu))
        << "cuda.indices, " << logits;
  }
}

TEST(GateCudaGradients, EveryCombination) {
  for (const Score score : {kSoftmax, kSigmoid, kSoftplus})
    for (const int64_t slots : {3, 34}) {
      const Inputs<float> in({9, 40, slots, "normal", "one", "some", true});
      for (int bits = 0; bits < 32; bits += score == kSoftmax ? 1 : 3)
        expect_cuda_equals_cpu(in, {score, (bits & 8) != 0, bits & 16 ? 0.125 : 0, 1.5, false,
                                    (bits & 4) != 0, (bits & 2) != 0, (bits & 1) != 0});
    }
}

// The operator looks at indices on the CPU only: there such a slot is an error, here a NaN.
TEST(GateCuda, IndicesOutOfRangeAreNan) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  for (const Score score : {kSoftmax, kSigmoid, kSoftplus})
    for (const int64_t slots : {2, 33})
      for (const bool renormalize : {false, true}) {
        SCOPED_TRACE(testing::Message() << slots << " slots, renormalize " << renormalize);
        const Options all{score, renormalize, 0, 1, true, true, true, true};
        Inputs<float> without({10, 40, slots, "normal", "uneven", "none", true});
        Inputs<float> with = without;
        int64_t t = 0;
        for (const int64_t bad : {int64_t{-2}, int64_t{40}, int64_t{1000}, kMost, -kMost}) {
          with.indices[t * slots] = bad;
          without.indices[t * slots] = -1;
          t += 2;
        }
        const Results<float> cpu = run_cpu(without, all), cuda = run_cuda(with, all);
        const double limit = tolerance<float>(with.shape);
        EXPECT_EQ(cuda.counts, cpu.counts);
        expect_close("lse", cuda.lse, cpu.lse, limit);
        expect_close("score_sums", cuda.score_sums, cpu.score_sums, limit);
        for (int64_t i = 0; i < 10 * slots; ++i) {
          const bool bad = i / slots % 2 == 0 && i % slots == 0;
          const bool beside_bad = i / slots % 2 == 0 && renormalize && with.indices[i] != -1;
          EXPECT_TRUE(bad || beside_bad ? std::isnan(cuda.weights[i])
                                        : close(cuda.weights[i], cpu.weights[i], limit))
              << i;
        }
        for (int64_t i = 0; i < 10 * 40; ++i) {
          const bool has_bad = i / 40 % 2 == 0, is_nan = score == kSoftmax && !renormalize;
          if (has_bad && !is_nan) continue;
          EXPECT_TRUE(has_bad ? std::isnan(cuda.grad_logits[i])
                              : close(cuda.grad_logits[i], cpu.grad_logits[i], limit))
              << i;
        }
      }
}

// Here a number of slots that there are not is one that there is.
TEST(GateCuda, SlotsPerTokenOutOfRange) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  for (const int64_t slots : {3, 33})
    for (const Score score : {kSoftmax, kSigmoid}) {
      Inputs<float> with(by({6, 40, slots}, score, score == kSoftmax ? "none" : "normal"));
      Inputs<float> without = with;
      with.token_top_k = {-1, -kMost, 0, slots + 1, 1000, kMost};
      without.token_top_k = {0, 0, 0, slots, slots, slots};
      const Options all{score, true, 0, 1, true, true, true, true};
      EXPECT_EQ(run_cuda(with, all).indices, run_cpu(without, all).indices);
      EXPECT_EQ(run_cuda(with, all).counts, run_cpu(without, all).counts);
      EXPECT_EQ(select<DeviceArray>(with, kOnCuda), select<HostArray>(without, kOnCpu));
    }
}

// Wrong sums, but no access out of bounds: the tools watch.
TEST(GateCuda, OffsetsThatMakeNoSense) {
  for (const int64_t experts : {5, 1025})
    for (const Values<int64_t>& offsets :
         {Values<int64_t>{0, 100, 50, 1000, -5}, Values<int64_t>{-7, -3, -1}, Values<int64_t>{9, 9},
          Values<int64_t>{1000, 0, 64, 63, 65, 64, 3, 70}}) {
      Inputs<float> in({70, experts, 1, "normal", "none", "some", true});
      in.offsets = offsets;
      in.shape.groups = static_cast<int64_t>(offsets.size()) - 1;
      in.grad_score_sums.resize(in.shape.groups * experts);
      EXPECT_NO_THROW(run_cuda(in, kAll));
    }
}

TEST(GateCuda, TooLargeAGridIsAnError) {
  Gate<float> params{};
  params.tokens = int64_t{1} << 40;
  params.experts = params.slots = params.groups = 1;
  float weight = 0;
  params.weights = &weight;
  EXPECT_THROW(gate_cuda(params, nullptr), std::runtime_error);
}

}  // namespace
}  // namespace torch_routers
