#include "common/row.h"
#include "router_losses/router_losses_kernel.h"
#include "router_losses/router_losses_math.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

using std::int64_t;

template <class T> Importance importance(const RouterLosses<T>& p) {
  const double sum = sum_row<double>(p.experts, [&](int64_t e) { return score_sum(p, e); });
  const double mean = sum / static_cast<double>(p.experts);
  return {p, mean, sum_row<double>(p.experts, [&](int64_t e) {
            const double deviation = score_sum(p, e) - mean;
            return deviation * deviation;
          })};
}

template <class T>
double sum_of_squares(const RouterLossesShape& p, const T* lse, int64_t block) {
  const int64_t first = block * p.kBlock, left = p.tokens - first;
  return sum_row<double>(left < p.kBlock ? left : p.kBlock,
                         [&](int64_t t) { return square_of_lse(lse[first + t]); });
}

struct Tokens {
  double all = 0, groups = 0;  // groups: those with tokens
};
template <class T> Tokens tokens(const RouterLosses<T>& p) {
  Tokens result;
  for (int64_t g = 0; g < p.groups; ++g) {
    result.all += static_cast<double>(p.group_tokens[g]);
    result.groups += p.group_tokens[g] > 0 ? 1 : 0;
  }
  return result;
}

// What the sum over e of c_e s_e of a set is multiplied by to become its part of the balance loss.
template <class T> double balance_scale(const RouterLosses<T>& p, int64_t set, const Tokens& all) {
  double slots = 0;
  for (int64_t e = 0; e < p.experts; ++e) slots += sum_of_set(p, p.counts, set, e);
  const double of_set = p.per_group ? static_cast<double>(p.group_tokens[set]) : all.all;
  const double sets = p.per_group ? at_least_one(all.groups) : 1;
  return static_cast<double>(p.experts) / (balance_divisor(p, of_set, slots) * sets);
}

template <class T> double balance(const RouterLosses<T>& p, const Tokens& all) {
  double loss = 0;
  for (int64_t set = 0; set < p.sets(); ++set) {
    const double dot = sum_row<double>(p.experts, [&](int64_t e) {
      return sum_of_set(p, p.counts, set, e) * sum_of_set(p, p.score_sums, set, e);
    });
    loss += balance_scale(p, set, all) * dot;
  }
  return loss;
}

template <class T> void write_slopes(const RouterLosses<T>& p, const Tokens& all) {
  *p.lse_slope = 2 * p.z_weight / at_least_one(all.all);
  if (!p.score_sums) return;
  for (int64_t set = 0; set < p.sets(); ++set) {
    const double scale = p.counts ? p.balance_weight * balance_scale(p, set, all) : 0;
    for (int64_t e = 0; e < p.experts; ++e)
      p.slopes[set * p.experts + e] = p.counts ? scale * sum_of_set(p, p.counts, set, e) : 0;
  }
  if (!p.importance) return;
  const Importance loss = importance(p);
  for (int64_t e = 0; e < p.experts; ++e) {
    const double slope = p.importance_weight * loss.slope(score_sum(p, e), p.experts);
    for (int64_t set = 0; set < p.sets(); ++set) p.slopes[set * p.experts + e] += slope;
  }
}

}  // namespace

template <class T> void router_losses(const LseSquares<T>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block)
    p.squares[block] = sum_of_squares(p, p.lse, block);
}

template <class T> void router_losses(const RouterLosses<T>& p, int64_t, int64_t) {
  const Tokens all = tokens(p);
  if (!p.total) return write_slopes(p, all);
  double z = 0;
  for (int64_t block = 0; p.lse && block < p.blocks(); ++block)
    z += p.squares ? p.squares[block] : sum_of_squares(p, p.lse, block);
  write_losses(p, p.counts ? balance(p, all) : 0, z / at_least_one(all.all),
               p.importance ? importance(p).value() : 0);
}

template <class T> void router_losses(const RouterLossesBackward<T>& p, int64_t begin,
                                      int64_t end) {
  const double grad = *p.grad_total;
  const int64_t tokens = p.lse ? p.tokens : 0;
  for (int64_t t = begin; t < (end < tokens ? end : tokens); ++t)
    p.grad_lse[t] = static_cast<T>(grad * slope_of_lse(*p.lse_slope, p.lse[t]));
  for (int64_t i = begin < tokens ? 0 : begin - tokens; i < end - tokens; ++i)
    p.grad_score_sums[i] = static_cast<T>(grad * p.slopes[p.per_group ? i : i % p.experts]);
}

#define TORCH_ROUTERS_INSTANTIATE(T)                                      \
  template void router_losses(const LseSquares<T>&, int64_t, int64_t);   \
  template void router_losses(const RouterLosses<T>&, int64_t, int64_t); \
  template void router_losses(const RouterLossesBackward<T>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)

}  // namespace torch_routers::TORCH_ROUTERS_ISA
