// The kernels of lora_mix on every instruction set: equal to loops in double, equal to the bit among
// each other, and nothing read or written that should not be. Memory is exact, so that sanitizers see
// each slip; what belongs to no row is NaN.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "lora_mix/lora_mix_kernel.h"
#include "numbers.h"
#include "threads.h"

namespace torch_routers {
namespace {

using std::int64_t;

// Every third slot is empty; behind the rows of the experts there are two of none.
template <class T> struct Problem {
  int64_t tokens, slots, features;
  std::vector<int64_t> rank;
  int64_t max_rank = 0;
  std::vector<int64_t> order, inverse, offsets{0}, ranks{0}, token_of_row, expert_of_row;
  std::vector<T> x, weight, z;

  Problem(int64_t tokens, int64_t slots, int64_t features, std::vector<int64_t> rank)
      : tokens(tokens),
        slots(slots),
        features(features),
        rank(rank),
        inverse(static_cast<std::size_t>(tokens * slots), -1) {
    for (int64_t e = 0; e < experts(); ++e) {
      for (int64_t slot = 0; slot < tokens * slots; ++slot)
        if (expert_of(slot) == e) {
          inverse[slot] = int64_t(order.size());
          order.push_back(slot);
          token_of_row.push_back(slot / slots);
          expert_of_row.push_back(e);
        }
      offsets.push_back(int64_t(order.size()));
      ranks.push_back(ranks.back() + rank[e]);
      max_rank = std::max(max_rank, rank[e]);
    }
    for (auto* of_rows : {&order, &token_of_row, &expert_of_row})
      of_rows->insert(of_rows->end(), 2, -1);
    x = random_numbers<T>(tokens * features, 1);
    weight = random_numbers<T>(ranks.back() * features, 2);
    z = random_numbers<T>(rows() * max_rank, 3);
    for (int64_t r = 0; r < rows(); ++r) {
      const int64_t columns = expert_of_row[r] < 0 ? 0 : rank[expert_of_row[r]];
      std::fill_n(z.begin() + r * max_rank + columns, max_rank - columns, number<T>(std::nan("")));
    }
  }

  int64_t experts() const { return int64_t(rank.size()); }
  int64_t rows() const { return int64_t(order.size()); }
  int64_t live() const { return offsets.back(); }
  int64_t expert_of(int64_t slot) const {
    return slot % 3 == 2 ? -1 : (slot * 7 + slot / 5) % experts();
  }

  LoraRows shape() const {
    return {tokens,   slots,        experts(),      rows(),         features,
            max_rank, order.data(), inverse.data(), offsets.data(), ranks.data()};
  }

  // In ranges of `step`, as threads would share them.
  template <class Params>
  static void run(Isa isa, const Params& params, const std::vector<int64_t>& of_row, int64_t count,
                  int64_t step) {
    for (int64_t begin = 0; begin < count; begin += step)
      TORCH_ROUTERS_PICK_ISA(isa,
                             lora_mix(params, of_row.data(), begin, std::min(begin + step, count)));
  }
  std::vector<T> shrink(Isa isa, int64_t step = 1 << 20) const {
    std::vector<T> result(static_cast<std::size_t>(rows() * max_rank), number<T>(7));
    run(isa, LoraShrink<T>{shape(), x.data(), weight.data(), result.data()}, token_of_row, rows(),
        step);
    return result;
  }
  std::vector<T> expand(Isa isa, int64_t step = 1 << 20) const {
    std::vector<T> y(static_cast<std::size_t>(tokens * features), number<T>(7));
    run(isa, LoraExpand<T>{shape(), z.data(), weight.data(), y.data()}, expert_of_row, tokens,
        step);
    return y;
  }
  std::vector<T> outer(Isa isa, int64_t step = 1 << 20) const {
    std::vector<T> result(weight.size(), number<T>(7));
    run(isa, LoraOuter<T>{shape(), z.data(), x.data(), result.data()}, token_of_row, features,
        step);
    return result;
  }
};

// A sum of products in double, with what rounding may do to it.
template <class T> struct Sum {
  double value = 0, size = 0;
  int64_t terms = 0;
  void add(T a, T b) {
    const double term = double(load(a)) * double(load(b));
    value += term, size += std::abs(term), ++terms;
  }
  void expect(T actual) const {
    const double bound = rounding<Compute<T>>() * double(terms + 2) * size +
                         1.01 * rounding<T>() * std::abs(value) + 1e-7 * (sizeof(T) < 4);
    ASSERT_NEAR(double(load(actual)), value, bound);
  }
};

template <class T> class LoraMixKernel : public testing::Test {};
using Types = testing::Types<float, double, BFloat16, Float16>;
TYPED_TEST_SUITE(LoraMixKernel, Types);

// Around every width of vector, block and tile; few tokens and many.
template <class T, class Check> void for_each_problem(const Check& check) {
  for (const int64_t features : {1, 3, 16, 17, 67, 131})
    for (const int64_t tokens : {1, 2, 9, 40})
      check(Problem<T>(tokens, 3, features, {4, 0, 1, 7, 2}));
  check(Problem<T>(700, 2, 20, {3}));          // more rows than one running sum of outer takes
  check(Problem<T>(300, 2, 35, {5, 9}));       // more tokens than share a weight
  check(Problem<T>(9, 2, 33, {130, 65}));      // more ranks than outer adds up at once
  check(Problem<T>(60, 4, 130, {900, 1100}));  // more than is packed
  check(Problem<T>(4, 2, 5, {0, 0}));
  check(Problem<T>(3, 0, 5, {2, 1}));
  check(Problem<T>(0, 2, 5, {2, 1}));
  check(Problem<T>(4, 2, 0, {2, 1}));
}

TYPED_TEST(LoraMixKernel, EqualsTheLoops) {
  using T = TypeParam;
  for_each_problem<T>([](const Problem<T>& q) {
    const auto z = q.shrink(isa()), y = q.expand(isa()), result = q.outer(isa());
    std::vector<Sum<T>> sums(result.size());
    for (int64_t r = 0; r < q.rows(); ++r)
      for (int64_t j = 0; j < q.max_rank; ++j) {
        const int64_t e = q.expert_of_row[r];
        Sum<T> sum;
        for (int64_t f = 0; e >= 0 && j < q.rank[e] && f < q.features; ++f) {
          const int64_t place = (q.ranks[e] + j) * q.features + f;
          const T of_token = q.x[q.token_of_row[r] * q.features + f];
          sum.add(q.weight[place], of_token);
          sums[place].add(q.z[r * q.max_rank + j], of_token);
        }
        sum.expect(z[r * q.max_rank + j]);
      }
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i].expect(result[i]);
    for (int64_t t = 0; t < q.tokens; ++t)
      for (int64_t f = 0; f < q.features; ++f) {
        Sum<T> sum;
        for (int64_t s = 0; s < q.slots; ++s)
          if (const int64_t r = q.inverse[t * q.slots + s]; r >= 0)
            for (int64_t j = 0, e = q.expert_of_row[r]; j < q.rank[e]; ++j)
              sum.add(q.z[r * q.max_rank + j], q.weight[(q.ranks[e] + j) * q.features + f]);
        sum.expect(y[t * q.features + f]);
      }
  });
}

TYPED_TEST(LoraMixKernel, SameBitsOnEveryInstructionSetAndForEveryShare) {
  using T = TypeParam;
  for_each_problem<T>([](const Problem<T>& q) {
    const auto z = bits(q.shrink(Isa::Default)), y = bits(q.expand(Isa::Default)),
               result = bits(q.outer(Isa::Default));
    for (const Isa candidate : {Isa::Default, Isa::Avx2, Isa::Avx512})
      for (const int64_t step : {3, 16, 1 << 20}) {
        if (candidate > isa()) continue;
        ASSERT_EQ(bits(q.shrink(candidate, step)), z) << name(candidate) << " " << step;
        ASSERT_EQ(bits(q.expand(candidate, step)), y) << name(candidate) << " " << step;
        ASSERT_EQ(bits(q.outer(candidate, step)), result) << name(candidate) << " " << step;
      }
  });
}

TYPED_TEST(LoraMixKernel, ATokenDoesNotDependOnTheOthers) {
  using T = TypeParam;
  const std::vector<int64_t> rank{6, 3, 5};
  const Problem<T> alone(1, 2, 53, rank), many(30, 2, 53, rank);
  const int64_t columns = many.max_rank, row = many.inverse[0];
  ASSERT_EQ(many.expert_of_row[row], alone.expert_of_row[alone.inverse[0]]);
  const auto one = alone.shrink(isa()), all = many.shrink(isa());
  const auto first = one.begin() + alone.inverse[0] * columns, same = all.begin() + row * columns;
  EXPECT_EQ(bits(std::vector<T>(first, first + columns)),
            bits(std::vector<T>(same, same + columns)));

  Problem<T> with_same_z = alone;
  for (int64_t s = 0; s < 2; ++s)
    if (alone.inverse[s] >= 0)
      std::copy_n(many.z.begin() + many.inverse[s] * columns, columns,
                  with_same_z.z.begin() + alone.inverse[s] * columns);
  auto y = many.expand(isa());
  y.resize(53);
  EXPECT_EQ(bits(with_same_z.expand(isa())), bits(y));
}

TEST(LoraMixKernelThreads, GiveTheSameBits) {
  const Problem<float> q(500, 2, 150, {8, 3, 16});
  const auto z = q.shrink(isa()), y = q.expand(isa()), result = q.outer(isa());
  for (const int threads : {2, 5}) {
    std::vector<float> z_of(z.size()), y_of(y.size()), result_of(result.size());
    const auto run = [&](const auto& params, const std::vector<int64_t>& of_row, int64_t count) {
      run_on_threads(threads, count, [&](int64_t begin, int64_t end) {
        lora_mix_cpu(params, of_row.data(), begin, end);
      });
    };
    run(LoraShrink<float>{q.shape(), q.x.data(), q.weight.data(), z_of.data()}, q.token_of_row,
        q.rows());
    run(LoraExpand<float>{q.shape(), q.z.data(), q.weight.data(), y_of.data()}, q.expert_of_row,
        q.tokens);
    run(LoraOuter<float>{q.shape(), q.z.data(), q.x.data(), result_of.data()}, q.token_of_row,
        q.features);
    EXPECT_EQ(bits(z_of), bits(z));
    EXPECT_EQ(bits(y_of), bits(y));
    EXPECT_EQ(bits(result_of), bits(result));
  }
}

// ---- the whole mixture, every factor where it lies ----

// The rows of `Problem`, and factors in memory of their own; those of experts without rows are null.
template <class T> struct Inference {
  const Problem<T> rows;
  int64_t features;
  std::vector<std::vector<T>> a, b;
  std::vector<const T*> a_places, b_places;
  std::vector<Compute<T>> gates, scaling;

  Inference(int64_t tokens, int64_t slots, int64_t in_features, int64_t features,
            const std::vector<int64_t>& rank, bool scaled)
      : rows(tokens, slots, in_features, rank), features(features) {
    for (int64_t e = 0; e < rows.experts(); ++e) {
      a.push_back(random_numbers<T>(rank[e] * in_features, 10 + e));
      b.push_back(random_numbers<T>(rank[e] * features, 50 + e));
      const bool has_rows = rows.offsets[e] < rows.offsets[e + 1];
      a_places.push_back(has_rows ? a[e].data() : nullptr);
      b_places.push_back(has_rows ? b[e].data() : nullptr);
      if (scaled) scaling.push_back(Compute<T>(0.5 + double(e)));
    }
    gates = random_numbers<Compute<T>>(tokens * slots, 4);
  }

  std::vector<T> run(Isa isa, int64_t step = 1 << 20, int threads = 1) const {
    std::vector<T> z(rows.live() * rows.max_rank, number<T>(7));
    std::vector<T> y(rows.tokens * features, number<T>(7));
    const LoraInfer<T> params{rows.tokens,       rows.experts(),
                              rows.features,     features,
                              rows.max_rank,     rows.offsets.data(),
                              rows.rank.data(),  rows.token_of_row.data(),
                              rows.order.data(), rows.x.data(),
                              a_places.data(),   b_places.data(),
                              gates.data(),      scaling.empty() ? nullptr : scaling.data(),
                              z.data(),          y.data()};
    const auto in_steps = [&](int64_t count, const auto& work) {
      run_on_threads(threads, count, [&](int64_t begin, int64_t end) {
        for (; begin < end; begin += step) work(begin, std::min(begin + step, end));
      });
    };
    in_steps(rows.live(), [&](int64_t begin, int64_t end) {
      TORCH_ROUTERS_PICK_ISA(isa, lora_infer_z(params, begin, end));
    });
    in_steps(features, [&](int64_t begin, int64_t end) {
      std::vector<Compute<T>> scratch(params.scratch_size(), std::nan(""));
      TORCH_ROUTERS_PICK_ISA(isa, lora_infer_y(params, scratch.data(), begin, end));
    });
    return y;
  }
};

// Ranks that fill a part of a block or several, one for all or several, and others.
template <class T, class Check> void for_each_inference(const Check& check) {
  for (const std::vector<int64_t>& rank :
       {std::vector<int64_t>{1, 1}, {2, 2}, {4, 4}, {8, 8}, {16, 16}, {5, 5}, {32, 16, 0, 7, 21}})
    for (const int64_t features : {1, 15, 16, 63, 64, 131})
      check(Inference<T>(9, 3, 19, features, rank, features % 2 == 1));
  check(Inference<T>(40, 3, 67, 80, {16, 12, 16}, true));
  check(Inference<T>(3, 0, 5, 6, {2, 1}, false));
  check(Inference<T>(0, 2, 5, 6, {2, 1}, false));
  check(Inference<T>(4, 2, 0, 6, {2, 1}, false));
  check(Inference<T>(4, 2, 5, 0, {2, 1}, false));
  check(Inference<T>(4, 2, 5, 6, {0, 0}, false));
}

TYPED_TEST(LoraMixKernel, InfersTheLoops) {
  using T = TypeParam;
  for_each_inference<T>([](const Inference<T>& q) {
    const auto y = q.run(isa());
    for (int64_t t = 0; t < q.rows.tokens; ++t)
      for (int64_t f = 0; f < q.features; ++f) {
        double sum = 0, size = 0;
        int64_t terms = 0;
        for (int64_t s = 0; s < q.rows.slots; ++s) {
          const int64_t slot = t * q.rows.slots + s, e = q.rows.expert_of(slot);
          for (int64_t j = 0; e >= 0 && j < q.rows.rank[e]; ++j) {
            double z = 0, z_size = 0;
            for (int64_t i = 0; i < q.rows.features; ++i, ++terms) {
              const double term = double(load(q.a[e][j * q.rows.features + i])) *
                                  double(load(q.rows.x[t * q.rows.features + i]));
              z += term, z_size += std::abs(term);
            }
            const double scale =
                double(q.gates[slot]) * (q.scaling.empty() ? 1 : double(q.scaling[e]));
            const double b = double(load(q.b[e][f * q.rows.rank[e] + j]));
            sum += scale * z * b, size += std::abs(scale * z_size * b);
          }
        }
        const double bound = rounding<Compute<T>>() * double(terms + 8) * size +
                             3 * rounding<T>() * size + 1e-7 * (sizeof(T) < 4);
        ASSERT_NEAR(double(load(y[t * q.features + f])), sum, bound);
      }
  });
}

TYPED_TEST(LoraMixKernel, InfersTheSameBitsOnEveryInstructionSetAndForEveryShare) {
  using T = TypeParam;
  for_each_inference<T>([](const Inference<T>& q) {
    const auto y = bits(q.run(Isa::Default));
    for (const Isa candidate : {Isa::Default, Isa::Avx2, Isa::Avx512})
      for (const int64_t step : {3, 16, 1 << 20}) {
        if (candidate > isa()) continue;
        ASSERT_EQ(bits(q.run(candidate, step)), y) << name(candidate) << " " << step;
      }
    ASSERT_EQ(bits(q.run(isa(), 1 << 20, 3)), y);
  });
}

}  // namespace
}  // namespace torch_routers
