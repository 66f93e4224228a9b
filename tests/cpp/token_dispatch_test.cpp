// The CPU kernels of token_dispatch on every instruction set and in every type, against loops.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "common/stream.h"
#include "token_dispatch_problem.h"

namespace torch_routers {
namespace {

using std::int64_t;

class TokenDispatch : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > isa()) GTEST_SKIP() << "this machine has no " << name(GetParam());
  }

  // In parts, as threads do it.
  template <class Params> void run(const Params& p, int64_t count) {
    int64_t begin = 0;
    for (const int64_t past : {count / 3, count / 2, count}) {
      TORCH_ROUTERS_PICK_ISA(GetParam(), dispatch(p, begin, past));
      begin = past;
    }
  }

  template <class T> void check(const DispatchCase& c) {
    SCOPED_TRACE(testing::Message() << c << ", " << sizeof(T) << " bytes");
    const DispatchProblem<T> p(c);
    const DispatchPlan plan = p.plan(p.order.data(), p.inverse.data());
    const double kUnset = 77;
    for (const bool weighed : {false, true}) {
      SCOPED_TRACE(weighed);
      const DispatchReference<T> expected{p, weighed};
      const Compute<T>* weights = weighed ? p.weights.data() : nullptr;
      std::vector<T> rows(p.row.size()), tokens(p.token.size()),
          grad_rows(weighed ? p.row.size() : 0);
      for (auto* values : {&rows, &tokens, &grad_rows})
        for (T& value : *values) store(&value, static_cast<Compute<T>>(kUnset));
      std::vector<Compute<T>> grad_weights(p.inverse.size(), kUnset);

      run(Permute<T>{plan, p.token.data(), weights, rows.data()}, c.tokens);
      run(ClearUnused<T>{plan, rows.data()}, p.max_rows());
      EXPECT_EQ(as_double(rows), as_double(expected.permute()));

      run(Combine<T>{plan, p.row.data(), weights, tokens.data()}, c.tokens);
      EXPECT_EQ(as_double(tokens), as_double(expected.combine()));

      run(CombineBackward<T>{plan, p.token.data(), p.row.data(), weights, grad_rows.data(),
                             grad_weights.data()},
          c.tokens);
      EXPECT_EQ(grad_weights, expected.grad_weights());
      if (!weighed) continue;
      run(ClearUnused<T>{plan, grad_rows.data()}, p.max_rows());
      EXPECT_EQ(as_double(grad_rows), as_double(expected.permute()));
    }
  }

  void check_all(const DispatchCase& c) {
    check<float>(c);
    check<double>(c);
    check<BFloat16>(c);
    check<Float16>(c);
  }
};

TEST_P(TokenDispatch, EqualsLoops) {
  for (const int64_t hidden : {0, 1, 7, 16, 33, 100, 520, 1100}) check_all({7, 2, hidden, 3, .2});
}

TEST_P(TokenDispatch, AnyNumberOfSlots) {
  for (const int64_t slots : {0, 1, 3, 4, 5, 7, 8, 9, 16, 17, 40}) {
    check_all({5, slots, 19, 1, .1});
    check_all({2, slots, 600, 0, .5});
  }
}

TEST_P(TokenDispatch, PlansThatAreEmpty) {
  check_all({0, 2, 5, 4});
  check_all({4, 2, 5, 0, 1});
  check_all({4, 2, 5, 3, 1});
}

TEST_P(TokenDispatch, LargeResultsPastTheCaches) {
  // Rows that begin at every alignment.
  check<float>({1040, 4, 1021, 3, .01});
  check<BFloat16>({1040, 8, 1023, 3, .01});
}

TEST_P(TokenDispatch, SumsAreRoundedOnce) {
  // In bfloat16, 256 + 1 is 256; the sum of three in float32 is 258.
  const std::vector<int64_t> order{0, 1, 2}, inverse{0, 1, 2};
  std::vector<BFloat16> row(3), y(1);
  store(&row[0], 256.0f);
  store(&row[1], 1.0f);
  store(&row[2], 1.0f);
  run(Combine<BFloat16>{{1, 3, 3, 1, order.data(), inverse.data()}, row.data(), nullptr, y.data()},
      1);
  EXPECT_EQ(load(y[0]), 258);
}

TEST_P(TokenDispatch, OneOrderOfSummation) {
  // Of the same bits on every instruction set: a sum whose result its order decides.
  const int64_t hidden = 1003;
  const std::vector<int64_t> order{0}, inverse{0};
  std::vector<float> token(hidden), row(hidden);
  for (int64_t h = 0; h < hidden; ++h) {
    token[h] = std::sin(1.0f + static_cast<float>(h));
    row[h] = 1 / (1 + static_cast<float>(h % 37));
  }
  float actual = 0, lanes[16] = {};
  run(CombineBackward<float>{{1, 1, 1, hidden, order.data(), inverse.data()},
                             token.data(),
                             row.data(),
                             nullptr,
                             nullptr,
                             &actual},
      1);
  for (int64_t h = 0; h < hidden; ++h) {
    volatile float product = token[h] * row[h];
    lanes[h % 16] += product;
  }
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  EXPECT_EQ(actual, lanes[0]);
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, TokenDispatch,
                         testing::Values(Isa::Default, Isa::Avx2, Isa::Avx512),
                         [](const auto& info) { return name(info.param); });

TEST(Stream, CopiesEverySizeAtEveryAlignment) {
  for (std::size_t to = 0; to < 17; ++to)
    for (std::size_t size = 0; size < 70; ++size) {
      std::vector<char> source(size + 1), target(to + size + 1, 'x');
      for (std::size_t i = 0; i < size; ++i) source[i] = static_cast<char>(i + 1);
      stream_copy(target.data() + to, source.data(), size);
      stream_fence();
      EXPECT_EQ(memcmp(target.data() + to, source.data(), size), 0) << to << " " << size;
      EXPECT_EQ(std::string(target.begin(), target.begin() + to), std::string(to, 'x'));
      EXPECT_EQ(target.back(), 'x');
    }
}

}  // namespace
}  // namespace torch_routers
