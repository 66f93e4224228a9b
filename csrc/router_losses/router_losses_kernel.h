// The common losses of a router, from the statistics of its gate, and their weighted sum. With
// c_ge the slots of expert e and s_ge its sum of scores over the T_g tokens of group g; c_e, s_e and
// T over all groups; E experts, and lse_t of each token:
//
//   balance     E sum_e f_e s_e / T, f_e = c_e / sum_i c_i, or c_e / T by the convention of Switch;
//               `per_group`: the same of each group alone, the mean over the groups with tokens
//   z           1/T sum_t lse_t^2, to which a token whose lse is -infinity adds 0
//   importance  V / m^2, 0 where m = 0; m = 1/E sum_e s_e, V = 1/d sum_e (s_e - m)^2, d = E, or
//               E - 1 if `unbiased`
//
//   slopes      d/d lse_t = 2 lse_t / T
//               d/d s_ge  = E f_e / T, of the group if `per_group`, divided by the number of those
//               d/d s_ge  = 2 (s_e - m) / (d m^2) - 2 V / (E m^3)
//
// Counts and numbers of tokens are constants. What is divided by is at least 1, so that without
// tokens losses and slopes are 0. All arithmetic is in double.
//
// Sums do not depend on threads: tokens come in blocks of kBlock, whose sums are added in order. A
// single block, as most calls have, needs no pass of its own.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

struct RouterLossesShape {
  std::int64_t tokens, groups, experts;
  bool per_group;
  static constexpr std::int64_t kBlock = 4096;

  TORCH_ROUTERS_HOST_DEVICE constexpr std::int64_t blocks() const {
    return (tokens + kBlock - 1) / kBlock;
  }
  // The sets of groups of which the balance loss is taken.
  TORCH_ROUTERS_HOST_DEVICE constexpr std::int64_t sets() const { return per_group ? groups : 1; }
  TORCH_ROUTERS_HOST_DEVICE constexpr std::int64_t groups_per_set() const {
    return per_group ? 1 : groups;
  }
};

template <class T> struct LseSquares : RouterLossesShape {
  const T* lse;     // [tokens]
  double* squares;  // [blocks]: sums of squares
};

template <class T> struct RouterLosses : RouterLossesShape {
  const T* score_sums;               // [groups, experts]; null: neither balance nor importance
  const std::int64_t* counts;        // [groups, experts]; null: no balance loss
  const std::int64_t* group_tokens;  // [groups]
  const T* lse;                      // [tokens]; null: no z-loss
  const double* squares;             // [blocks]; null if there is at most one
  bool importance, switch_convention, unbiased;
  double balance_weight, z_weight, importance_weight;
  // Either the losses or the slopes are null.
  T* total;
  T* values;          // [3]: balance, z and importance, unweighted; 0 for what is not there
  double* lse_slope;  // [1]: of the total, to be multiplied by lse
  double* slopes;     // [sets, experts]: of the total, by score_sums
};

template <class T> struct RouterLossesBackward : RouterLossesShape {
  const T* grad_total;
  const T* lse;  // [tokens]; null: no z-loss
  const double* lse_slope;
  const double* slopes;
  T* grad_lse;         // [tokens]
  T* grad_score_sums;  // [groups, experts]; null: neither balance nor importance
};

// On the calling thread: blocks, everything (a range of one), elements of grad_lse followed by those
// of grad_score_sums.
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T> void router_losses(const LseSquares<T>&, std::int64_t begin, std::int64_t end);
  template <class T> void router_losses(const RouterLosses<T>&, std::int64_t begin, std::int64_t end);
  template <class T> void router_losses(const RouterLossesBackward<T>&, std::int64_t begin,
                                        std::int64_t end);
)

template <class Params>
void router_losses_cpu(const Params& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), router_losses(params, begin, end));
}

// All of it, queued on `stream` (a cudaStream_t) of the current device.
template <class T> void router_losses_cuda(const LseSquares<T>&, void* stream);
template <class T> void router_losses_cuda(const RouterLosses<T>&, void* stream);
template <class T> void router_losses_cuda(const RouterLossesBackward<T>&, void* stream);

}  // namespace torch_routers
