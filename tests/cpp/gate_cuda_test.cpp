// The CUDA kernels against the CPU kernels: the same experts and counts, and the same weights,
// statistics and gradients within a few units in the last place.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "device_array.h"
#include "gate/gate_kernel.h"

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
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << c.tokens << "x" << c.experts << (c.given ? "_given" : "_top") << c.slots << "_"
      << c.logits;
  if (c.groups != "none") out << "_groups_" << c.groups;
  if (c.masked != "none") out << "_masked_" << c.masked;
  return out;
}

double logit(const std::string& kind, std::mt19937& random) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double x = std::normal_distribution<double>()(random);
  if (kind == "ties") return std::round(x);  // -0 and 0 among them
  if (kind == "masked") return random() % 4 ? -kInfinity : x;
  if (kind == "infinite") return random() % 16 ? x : x > 0 ? kInfinity : -kInfinity;
  if (kind == "nan") return random() % 16 ? x : std::copysign(std::nan(""), x);
  if (kind == "extreme") return 80 * x;
  return x;
}

template <class T>
Values<T> draw(int64_t size, const std::string& kind, std::mt19937& random) {
  Values<T> values(size);
  for (T& value : values) value = static_cast<T>(logit(kind, random));
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

template <class T> struct Inputs {
  GateShape shape;
  Values<T> logits;
  Bytes valid;
  Values<int64_t> offsets, indices;
  Values<T> grad_weights, grad_lse, grad_score_sums;

  explicit Inputs(const Case& c) {
    std::mt19937 random(static_cast<unsigned>(c.tokens + c.experts));
    offsets = torch_routers::offsets(c.groups, c.tokens);
    shape = {c.tokens, c.experts, c.slots,
             offsets.empty() ? 1 : static_cast<int64_t>(offsets.size()) - 1};
    logits = draw<T>(c.tokens * c.experts, c.logits, random);
    if (c.masked != "none") {
      for (int64_t t = 0; t < c.tokens; ++t) valid.push_back(c.masked == "some" && random() % 3);
      for (int64_t i = 0; i < c.tokens * c.experts; ++i)
        if (!valid[i / c.experts]) logits[i] = std::numeric_limits<T>::quiet_NaN();
    }
    for (int64_t i = 0; c.given && i < c.tokens * c.slots; ++i)
      indices.push_back(static_cast<int64_t>(random() % (c.experts + 1)) - 1);
    grad_weights = draw<T>(c.tokens * c.slots, "normal", random);
    grad_lse = draw<T>(c.tokens, "normal", random);
    grad_score_sums = draw<T>(shape.groups * c.experts, "normal", random);
    // Of no consequence: the gradient of no slot, and where all logits are -infinity that of lse.
    for (std::size_t i = 0; i < indices.size(); ++i)
      if (indices[i] == -1) grad_weights[i] = std::numeric_limits<T>::quiet_NaN();
    for (int64_t t = 1; c.logits == "masked" && t < c.tokens; t += 2)
      grad_lse[t] = -std::numeric_limits<T>::infinity();
  }
};

struct Options {
  bool renormalize, statistics, grad_weights, grad_lse, grad_score_sums;
};

// ---- results -----------------------------------------------------------------------------------

template <class T> struct Results {
  Values<T> weights;
  Values<int64_t> indices;
  Values<T> lse, score_sums;
  Values<int64_t> counts, group_tokens;
  Values<T> grad_logits;
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

// `run(params, count)` runs one of the three.
template <template <class> class Array, class T, class Run>
Results<T> run(const Inputs<T>& in, const Options& o, const Run& run) {
  const GateShape& shape = in.shape;
  const auto null_or = [](bool wanted, const auto& array) {
    return wanted ? array.data() : nullptr;
  };
  const Array<T> logits(in.logits), weights(shape.tokens * shape.slots);
  const Array<unsigned char> valid_bytes(in.valid);
  const Array<int64_t> all_offsets(in.offsets);
  const auto* valid = reinterpret_cast<const bool*>(null_or(!in.valid.empty(), valid_bytes));
  const int64_t* offsets = null_or(!in.offsets.empty(), all_offsets);
  const bool select = in.indices.empty();
  const Array<int64_t> indices =
      select ? Array<int64_t>(weights.to_host().size()) : Array<int64_t>(in.indices);

  const Array<T> lse(o.statistics ? shape.tokens : 0);
  const Array<T> scores(shape.blocks() * shape.experts);
  const Array<T> partial_sums(shape.segments() * shape.experts);
  const Array<int64_t> partial_counts(shape.segments() * shape.experts);
  run(Gate<T>{shape, logits.data(), valid, offsets, indices.data(), weights.data(),
              null_or(o.statistics, lse), scores.data(), null_or(o.statistics, partial_sums),
              partial_counts.data(), select, o.renormalize},
      shape.blocks());

  const Array<T> score_sums(o.statistics ? shape.groups * shape.experts : 0);
  const Array<int64_t> counts(shape.groups * shape.experts), group_tokens(shape.groups);
  run(GateCombine<T>{shape, valid, offsets, partial_sums.data(), partial_counts.data(),
                     null_or(o.statistics, score_sums), counts.data(), group_tokens.data()},
      shape.groups);

  const Array<T> grad_weights(in.grad_weights), grad_lse(in.grad_lse),
      grad_score_sums(in.grad_score_sums), grad_logits(in.logits.size());
  run(GateBackward<T>{shape, null_or(o.grad_weights, grad_weights), null_or(o.grad_lse, grad_lse),
                      null_or(o.grad_score_sums, grad_score_sums), logits.data(), valid, offsets,
                      indices.data(), grad_logits.data(), o.renormalize},
      shape.tokens);
  return {weights.to_host(), indices.to_host(),      lse.to_host(),        score_sums.to_host(),
          counts.to_host(),  group_tokens.to_host(), grad_logits.to_host()};
}

template <class T> Results<T> run_cpu(const Inputs<T>& in, const Options& o) {
  return run<HostArray>(in, o, [](const auto& p, int64_t count) { gate_cpu(p, 0, count); });
}
template <class T> Results<T> run_cuda(const Inputs<T>& in, const Options& o) {
  return run<DeviceArray>(in, o, [](const auto& p, int64_t) { gate_cuda(p, nullptr); });
}

// ---- comparison --------------------------------------------------------------------------------

// The two sum over experts, slots and the tokens of a block in different orders.
template <class T> double tolerance(const GateShape& shape) {
  const auto terms = static_cast<double>(32 + shape.experts / 4 + 4 * shape.slots);
  return terms * std::numeric_limits<T>::epsilon();
}

template <class T> bool close(T actual, T expected, double tolerance) {
  return actual == expected || (std::isnan(actual) && std::isnan(expected)) ||
         std::abs(actual - expected) <= tolerance * (std::abs(expected) + 0.1);
}

template <class T>
void expect_close(const char* what, const Values<T>& actual, const Values<T>& expected,
                  double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i)
    if (!close(actual[i], expected[i], tolerance)) {
      ADD_FAILURE() << what << " at " << i << ": " << actual[i] << ", on the CPU " << expected[i];
      return;
    }
}

template <class T> void expect_cuda_equals_cpu(const Inputs<T>& in, const Options& o) {
  SCOPED_TRACE(testing::Message() << (o.renormalize ? "renormalize " : "")
                                  << (o.statistics ? "statistics " : "") << o.grad_weights
                                  << o.grad_lse << o.grad_score_sums);
  const Results<T> cpu = run_cpu(in, o), cuda = run_cuda(in, o);
  const double limit = tolerance<T>(in.shape);
  EXPECT_EQ(cuda.indices, cpu.indices);
  EXPECT_EQ(cuda.counts, cpu.counts);
  EXPECT_EQ(cuda.group_tokens, cpu.group_tokens);
  expect_close("weights", cuda.weights, cpu.weights, limit);
  expect_close("lse", cuda.lse, cpu.lse, limit);
  expect_close("score_sums", cuda.score_sums, cpu.score_sums, limit);
  expect_close("grad_logits", cuda.grad_logits, cpu.grad_logits, limit);
}

// ---- tests -------------------------------------------------------------------------------------

class GateCuda : public testing::TestWithParam<Case> {
 protected:
  template <class T> void compare() {
    const Inputs<T> in(GetParam());
    for (const bool renormalize : {false, true}) {
      expect_cuda_equals_cpu(in, {renormalize, true, true, true, true});
      expect_cuda_equals_cpu(in, {renormalize, false, true, false, false});
    }
  }
};
TEST_P(GateCuda, Float) { compare<float>(); }
TEST_P(GateCuda, Double) { compare<double>(); }

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
        Case{66, 40, 33, "ties", "uneven", "some"}, Case{3, 64, 64, "masked"},
        Case{9, 3, 40, "masked", "none", "none", true},
        Case{5, 64, 50, "normal", "none", "none", true}, Case{3, 40, 40, "nan"},
        Case{2, 1025, 8, "ties"}, Case{2, 1500, 4, "infinite", "none", "some", true}),
    testing::PrintToStringParamName());

TEST(GateCudaGradients, EveryCombination) {
  for (const int64_t slots : {3, 34}) {
    const Inputs<float> in({9, 40, slots, "normal", "one", "some", true});
    for (int bits = 0; bits < 16; ++bits)
      expect_cuda_equals_cpu(
          in, {(bits & 8) != 0, false, (bits & 4) != 0, (bits & 2) != 0, (bits & 1) != 0});
  }
}

// The operator looks at indices on the CPU only: there such a slot is an error, here a NaN.
TEST(GateCuda, IndicesOutOfRangeAreNan) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  for (const int64_t slots : {2, 33})
    for (const bool renormalize : {false, true}) {
      SCOPED_TRACE(testing::Message() << slots << " slots, renormalize " << renormalize);
      const Options all{renormalize, true, true, true, true};
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
        if (bad || beside_bad)
          EXPECT_TRUE(std::isnan(cuda.weights[i])) << i;
        else
          EXPECT_TRUE(close(cuda.weights[i], cpu.weights[i], limit)) << i;
      }
      for (int64_t i = 0; i < 10 * 40; ++i)
        if (i / 40 % 2 == 0)
          EXPECT_TRUE(renormalize || std::isnan(cuda.grad_logits[i])) << i;
        else
          EXPECT_TRUE(close(cuda.grad_logits[i], cpu.grad_logits[i], limit)) << i;
    }
}

// Wrong sums, but no access out of bounds: the tools watch.
TEST(GateCuda, OffsetsThatMakeNoSense) {
  for (const int64_t experts : {5, 1025})
    for (const Values<int64_t>& offsets :
         {Values<int64_t>{0, 100, 50, 1000, -5}, Values<int64_t>{-7, -3, -1}, Values<int64_t>{9, 9},
          Values<int64_t>{1000, 0, 64, 63, 65, 64, 3, 70}}) {
      Inputs<float> in({70, experts, 1, "normal", "none", "some"});
      in.offsets = offsets;
      in.shape.groups = static_cast<int64_t>(offsets.size()) - 1;
      in.grad_score_sums.resize(in.shape.groups * experts);
      EXPECT_NO_THROW(run_cuda(in, {false, true, true, true, true}));
    }
}

TEST(GateCuda, TooLargeAGridIsAnError) {
  Gate<float> params{};
  params.tokens = int64_t{1} << 40;
  params.experts = params.slots = params.groups = 1;
  EXPECT_THROW(gate_cuda(params, nullptr), std::runtime_error);
}

}  // namespace
}  // namespace torch_routers
