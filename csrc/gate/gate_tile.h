// The gate of kLanes tokens at a time, on the CPU: an expert's logits of all of them side by side,
// so that nothing is added or compared across a vector. Included by gate_cpu.cpp alone.
#pragma once

#include "common/tile.h"
#include "gate/gate_row.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

constexpr int64_t kTileExperts = 64, kTileSlots = 16, kNetworkSlots = 8;

bool in_tiles(const GateShape& p) { return p.experts <= kTileExperts && p.slots <= kTileSlots; }

// Tokens of one segment. A lane without one, or with a masked one, has logits 0 and no slots.
template <class C> struct Tile {
  alignas(64) Lanes<C> x[kTileExperts];
  alignas(64) Lanes<C> scores[kTileExperts];  // or the gradient of x
  alignas(64) Lanes<C> sums[kTileExperts];    // of the segment's score_sums
  alignas(64) Lanes<C> slots[kTileSlots];     // logits, scores, weights
  alignas(64) Lanes<C> max, sum, scale;       // of the softmax over all experts
  alignas(64) Lanes<SignedBits<C>> index[kTileSlots];
  bool is_live[kLanes], all_live;
};

// The sum of term(e, lane) over e, in four parts.
template <class C, class Term> void sum_lanes(int64_t experts, const Term& term, Lanes<C>& result) {
  alignas(64) Lanes<C> parts[4] = {};
  for (int64_t e = 0; e < experts; ++e) each_lane([&](int l) { parts[e % 4][l] += term(e, l); });
  each_lane([&](int l) { result[l] = (parts[0][l] + parts[1][l]) + (parts[2][l] + parts[3][l]); });
}

template <class S, class Params>
void load_gate_tile(const Params& p, int64_t first, int64_t count, Tile<Compute<S>>& tile) {
  const int64_t experts = p.experts;
  tile.all_live = count == kLanes;
  for (int64_t l = 0; l < kLanes; ++l) {
    tile.is_live[l] = l < count && !is_masked(p, first + l);
    tile.all_live &= tile.is_live[l];
  }
  load_tile(p.logits + first * experts, experts, tile.is_live, tile.x);
}

template <class C>
void load_indices(const int64_t* indices, int64_t count, int64_t slots, Tile<C>& tile) {
  for (int64_t j = 0; j < slots; ++j)
    for (int64_t l = 0; l < kLanes; ++l)
      tile.index[j][l] = l < count && tile.is_live[l]
                             ? static_cast<SignedBits<C>>(indices[l * slots + j])
                             : SignedBits<C>{-1};
}

// exp(x - max) into the scores.
template <class C> void softmax_tile(int64_t experts, Tile<C>& tile) {
  each_lane([&](int l) { tile.max[l] = kLowest<C>; });
  for (int64_t e = 0; e < experts; ++e)
    each_lane(
        [&](int l) { tile.max[l] = tile.x[e][l] > tile.max[l] ? tile.x[e][l] : tile.max[l]; });
  each_lane([&](int l) { tile.max[l] = tile.max[l] == kLowest<C> ? C{0} : tile.max[l]; });
  for (int64_t e = 0; e < experts; ++e)
    each_lane([&](int l) { tile.scores[e][l] = own_exp(tile.x[e][l] - tile.max[l]); });
  sum_lanes<C>(experts, [&](int64_t e, int l) { return tile.scores[e][l]; }, tile.sum);
  each_lane([&](int l) { tile.scale[l] = inverse_or_zero(tile.sum[l]); });
}

// Scores, after softmax_tile if they are softmax; their sums are 1 / `factor`.
template <Score kScore, class C>
void score_tile(int64_t experts, Tile<C>& tile, Lanes<C>* scores, Lanes<C>& factor) {
  if constexpr (kScore == Score::Softmax) {
    each_lane([&](int l) { factor[l] = tile.scale[l]; });
  } else {
    for (int64_t e = 0; e < experts; ++e)
      each_lane([&](int l) { scores[e][l] = score_of(kScore, tile.x[e][l]); });
    sum_lanes<C>(experts, [&](int64_t e, int l) { return scores[e][l]; }, factor);
    each_lane([&](int l) { factor[l] = inverse_or_zero(factor[l]); });
  }
}

// The logits of the slots; -infinity in an empty one.
template <class C> void load_slots(int64_t slots, Tile<C>& tile) {
  for (int64_t j = 0; j < slots; ++j)
    for (int l = 0; l < kLanes; ++l)
      tile.slots[j][l] = tile.index[j][l] < 0 ? kLowest<C> : tile.x[tile.index[j][l]][l];
}

// From the slots' logits to their softmax.
template <class C> void softmax_of_slots(int64_t slots, Tile<C>& tile) {
  alignas(64) Lanes<C> max, sum = {};
  each_lane([&](int l) { max[l] = kLowest<C>; });
  for (int64_t j = 0; j < slots; ++j)
    each_lane([&](int l) { max[l] = tile.slots[j][l] > max[l] ? tile.slots[j][l] : max[l]; });
  each_lane([&](int l) { max[l] = max[l] == kLowest<C> ? C{0} : max[l]; });
  for (int64_t j = 0; j < slots; ++j)
    each_lane([&](int l) {
      tile.slots[j][l] = tile.index[j][l] < 0 ? C{0} : own_exp(tile.slots[j][l] - max[l]);
      sum[l] += tile.slots[j][l];
    });
  each_lane([&](int l) { sum[l] = inverse_or_zero(sum[l]); });
  for (int64_t j = 0; j < slots; ++j) each_lane([&](int l) { tile.slots[j][l] *= sum[l]; });
}

// From the slots' logits to their scores, 0 in an empty one, and what those are divided by.
template <Score kScore, class C>
void scores_of_slots(const GateWeights<C>& p, int64_t slots, Tile<C>& tile, Lanes<C>& all) {
  each_lane([&](int l) { all[l] = 0; });
  for (int64_t j = 0; j < slots; ++j)
    each_lane([&](int l) {
      const C x = tile.slots[j][l];
      const C score =
          kScore == Score::Softmax ? own_exp(x - tile.max[l]) * tile.scale[l] : score_of(kScore, x);
      tile.slots[j][l] = tile.index[j][l] < 0 ? C{0} : score;
      all[l] += tile.slots[j][l];
    });
  each_lane([&](int l) { all[l] = divisor(p, all[l]); });
}

// ---- forward -----------------------------------------------------------------------------------

// The best of each lane, by insertion into a sorted list.
template <int kSlots, class C> void select_tile(int64_t experts, Tile<C>& tile) {
  using Key = SignedBits<C>;
  for (int part = 0; part < kLanes; part += kWidth<Key>) {
    Vector<Key> keys[kSlots], index[kSlots];
    for (int j = 0; j < kSlots; ++j) keys[j] = Vector<Key>{} + kNoKey<C>, index[j] = Vector<Key>{};
    for (int64_t e = 0; e < experts; ++e) {
      alignas(64) Key of_expert[kWidth<Key>];
      for (int l = 0; l < kWidth<Key>; ++l) of_expert[l] = signed_key(tile.x[e][part + l]);
      const Vector<Key> key = load_vector(of_expert), expert = Vector<Key>{} + static_cast<Key>(e);
      // Of equals the first stays: only what is larger comes before it.
      for (int j = kSlots - 1; j > 0; --j) {
        const auto is_above = key > keys[j - 1], is_in = key > keys[j];
        keys[j] = is_in ? (is_above ? keys[j - 1] : key) : keys[j];
        index[j] = is_in ? (is_above ? index[j - 1] : expert) : index[j];
      }
      const auto is_best = key > keys[0];
      keys[0] = is_best ? key : keys[0];
      index[0] = is_best ? expert : index[0];
    }
    for (int j = 0; j < kSlots; ++j) store_vector(tile.index[j] + part, index[j]);
  }
}
template <int kSlots = 1, class C> void select_tile(int64_t experts, int64_t slots, Tile<C>& tile) {
  if (slots == kSlots)
    select_tile<kSlots>(experts, tile);
  else if constexpr (kSlots < kNetworkSlots)
    select_tile<kSlots + 1>(experts, slots, tile);
}

template <Score kScore, class S>
void gate_tile(const Gate<S>& p, int64_t first, int64_t count, int64_t* counts,
               Tile<Compute<S>>& tile, const Buffers<Compute<S>>& b) {
  using C = Compute<S>;
  load_gate_tile<S>(p, first, count, tile);
  const int64_t experts = p.experts, slots = p.slots;  // not read again after each store
  int64_t* indices = p.indices + first * slots;
  const bool by_network = p.select && p.selection.by_logits() && slots <= kNetworkSlots;
  if (by_network) {
    select_tile(experts, slots, tile);
    for (int64_t l = 0; (p.token_top_k || !tile.all_live) && l < kLanes; ++l) {
      const int64_t used = !tile.is_live[l] ? 0 : p.token_top_k ? p.token_top_k[first + l] : slots;
      for (int64_t j = used; j < slots; ++j) tile.index[j][l] = -1;
    }
    for (int64_t l = 0; l < count; ++l)  // token by token: a cache line is written at once
      for (int64_t j = 0; j < slots; ++j) indices[l * slots + j] = tile.index[j][l];
  }
  for (int64_t l = 0; p.select && !by_network && l < count; ++l) {
    int64_t* best = indices + l * slots;
    if (tile.is_live[l]) {
      select_row<kScore>(p, load_row(p.logits + (first + l) * experts, experts, b.x), b, best);
      empty_slots(p, first + l);
    } else {
      for (int64_t j = 0; j < slots; ++j) best[j] = -1;
    }
  }
  if (!p.weighs()) return;
  if (!by_network) load_indices(indices, count, slots, tile);

  const bool of_slots = kScore == Score::Softmax && p.weighing.of_slots();
  if (p.lse || (kScore == Score::Softmax && !of_slots)) softmax_tile(experts, tile);
  load_slots(slots, tile);
  alignas(64) Lanes<C> all;
  if (of_slots)
    softmax_of_slots(slots, tile);
  else
    scores_of_slots<kScore>(p.weighing, slots, tile, all);
  for (int64_t j = 0; j < slots; ++j)
    each_lane([&](int l) {
      const C w = of_slots ? tile.slots[j][l] : tile.slots[j][l] / all[l];
      tile.slots[j][l] = tile.index[j][l] < 0 ? C{0} : p.weighing.scale * w;
    });
  C* weights = p.weights + first * slots;
  for (int64_t l = 0; l < count; ++l)
    for (int64_t j = 0; j < slots; ++j) {
      weights[l * slots + j] = tile.slots[j][l];
      if (tile.index[j][l] >= 0) ++counts[tile.index[j][l]];
    }
  if (!p.lse) return;

  alignas(64) Lanes<C> lse, factor;
  each_lane([&](int l) {
    lse[l] = tile.sum[l] == 0
                 ? kLowest<C>
                 : static_cast<C>(tile.max[l] + own_log(static_cast<double>(tile.sum[l])));
  });
  for (int64_t l = 0; l < count; ++l) p.lse[first + l] = tile.is_live[l] ? lse[l] : C{0};
  score_tile<kScore>(experts, tile, tile.scores, factor);
  each_lane([&](int l) { factor[l] = tile.is_live[l] ? factor[l] : C{0}; });
  for (int64_t e = 0; e < experts; ++e)
    each_lane([&](int l) { tile.sums[e][l] += factor[l] * tile.scores[e][l]; });
}

// ---- backward ----------------------------------------------------------------------------------

template <Score kScore, class S>
void gate_tile(const GateBackward<S>& p, int64_t first, int64_t count, int64_t group,
               Tile<Compute<S>>& tile) {
  using C = Compute<S>;
  load_gate_tile<S>(p, first, count, tile);
  const bool of_slots = kScore == Score::Softmax && p.weighing.of_slots();
  const C* h = p.grad_score_sums ? p.grad_score_sums + group * p.experts : nullptr;
  const bool by_softmax = p.grad_lse || (kScore == Score::Softmax && (h || !of_slots));
  if (by_softmax) softmax_tile(p.experts, tile);
  auto& dx = tile.scores;
  alignas(64) Lanes<C> dot = {}, q = {}, mean = {}, all;

  if (p.grad_weights) {  // the slots become their shares in the gradient, of logits
    load_indices(p.indices + first * p.slots, count, p.slots, tile);
    load_slots(p.slots, tile);
    alignas(64) Lanes<C> v[kTileSlots], slopes[kTileSlots];
    for (int64_t j = 0; j < p.slots; ++j) {
      for (int64_t l = 0; l < kLanes; ++l)
        v[j][l] = tile.index[j][l] < 0 ? C{0} : p.grad_weights[(first + l) * p.slots + j];
      if constexpr (kScore != Score::Softmax)
        each_lane([&](int l) { slopes[j][l] = slope_of(kScore, tile.slots[j][l]); });
    }
    if (of_slots)
      softmax_of_slots(p.slots, tile);
    else
      scores_of_slots<kScore>(p.weighing, p.slots, tile, all);
    for (int64_t j = 0; p.weighing.renormalize && j < p.slots; ++j)
      each_lane([&](int l) {
        mean[l] += v[j][l] * (of_slots ? tile.slots[j][l] : tile.slots[j][l] / all[l]);
      });
    for (int64_t j = 0; j < p.slots; ++j)
      each_lane([&](int l) {
        const C r =
            p.weighing.scale * (of_slots ? v[j][l] - mean[l] : (v[j][l] - mean[l]) / all[l]);
        const C slope = kScore == Score::Softmax ? tile.slots[j][l] : slopes[j][l];
        tile.slots[j][l] = tile.index[j][l] < 0 ? C{0} : r * slope;
        if (!of_slots) dot[l] += tile.slots[j][l];
      });
  }
  for (int64_t l = 0; p.grad_lse && l < count; ++l)  // an infinite lse has an infinite gradient
    q[l] = tile.is_live[l] && tile.sum[l] != 0 ? p.grad_lse[first + l] : C{0};

  if (by_softmax && kScore == Score::Softmax) {
    if (h) {
      alignas(64) Lanes<C> sum;
      sum_lanes<C>(p.experts, [&](int64_t e, int l) { return h[e] * dx[e][l]; }, sum);
      each_lane([&](int l) { dot[l] += tile.scale[l] * sum[l]; });
    }
    each_lane([&](int l) { q[l] -= dot[l]; });
    for (int64_t e = 0; e < p.experts; ++e)
      each_lane([&](int l) { dx[e][l] *= tile.scale[l] * ((h ? h[e] : C{0}) + q[l]); });
  } else {
    for (int64_t e = 0; e < p.experts; ++e)
      each_lane([&](int l) { dx[e][l] = by_softmax ? dx[e][l] * tile.scale[l] * q[l] : C{0}; });
    if (h && kScore != Score::Softmax) {
      alignas(64) Lanes<C> scores[kTileExperts], factor;
      score_tile<kScore>(p.experts, tile, scores, factor);
      sum_lanes<C>(p.experts, [&](int64_t e, int l) { return h[e] * scores[e][l]; }, dot);
      each_lane([&](int l) { dot[l] *= factor[l]; });
      for (int64_t e = 0; e < p.experts; ++e)
        each_lane([&](int l) {
          dx[e][l] += factor[l] * (h[e] - dot[l]) * slope_of(kScore, tile.x[e][l]);
        });
    }
  }
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t j = 0; p.grad_weights && j < p.slots; ++j)
      if (tile.index[j][l] >= 0) dx[tile.index[j][l]][l] += tile.slots[j][l];
  }
  const int64_t experts = p.experts;
  for (int64_t l = 0; !tile.all_live && l < count; ++l)
    for (int64_t e = 0; !tile.is_live[l] && e < experts; ++e) dx[e][l] = 0;
  store_tile(dx, experts, count, p.grad_logits + first * experts);
}

}  // namespace
}  // namespace torch_routers::TORCH_ROUTERS_ISA
