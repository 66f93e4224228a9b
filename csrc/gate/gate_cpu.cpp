// In tiles of tokens where experts are few, else row by row. The two add up in different orders:
// which one it is depends on the number of experts and slots alone, and never on that of tokens, so
// that the result of a token does not depend on its batch.
#include "gate/gate_row.h"
#include "gate/gate_tile.h"

namespace torch_routers::TORCH_ROUTERS_ISA {
namespace {

// body.operator()<kScore>(): loops over a row do not ask which score it is.
template <class Body> void with_score(Score score, const Body& body) {
  switch (score) {
    case Score::Softmax: return body.template operator()<Score::Softmax>();
    case Score::Sigmoid: return body.template operator()<Score::Sigmoid>();
    case Score::SqrtSoftplus: return body.template operator()<Score::SqrtSoftplus>();
    case Score::Identity: return body.template operator()<Score::Identity>();
  }
}

// body(group, first token, token behind the last) for the segments of a block.
template <class Params, class Body>
void for_each_segment(const Params& p, int64_t block, const Body& body) {
  int64_t first = block * p.kBlock;
  const int64_t past = smaller(first + p.kBlock, p.tokens);
  for (int64_t group = group_of(p, first); first < past; ++group) {
    const int64_t end = smaller(group_end(p, group), past);
    if (first < end) body(group, first, end);
    first = first < end ? end : first;
  }
}

template <Score kScore, class S> void gate_block(const Gate<S>& p, int64_t block) {
  using C = Compute<S>;
  StackBuffers<C> stack;
  Tile<C> tile;
  const Buffers<C> buffers = stack.get(p, p.scratch, block);
  for_each_segment(p, block, [&](int64_t group, int64_t first, int64_t past) {
    const int64_t segment = block + group;
    int64_t* counts = p.weighs() ? p.partial_counts + segment * p.experts : nullptr;
    C* sums = p.lse ? p.partial_sums + segment * p.experts : nullptr;
    if (p.weighs()) {
      p.partial_tokens[segment] = past - first;
      for (int64_t t = first; p.valid && t < past; ++t) p.partial_tokens[segment] -= !p.valid[t];
      for (int64_t e = 0; e < p.experts; ++e) counts[e] = 0;
    }
    if (!in_tiles(p)) {
      for (int64_t e = 0; p.lse && e < p.experts; ++e) sums[e] = 0;
      for (int64_t t = first; t < past; ++t) gate_row<kScore>(p, t, segment, buffers);
      return;
    }
    for (int64_t e = 0; p.lse && e < p.experts; ++e) each_lane([&](int l) { tile.sums[e][l] = 0; });
    for (int64_t t = first; t < past; t += kLanes)
      gate_tile<kScore>(p, t, smaller(past - t, kLanes), counts, tile, buffers);
    for (int64_t e = 0; p.lse && e < p.experts; ++e)
      sums[e] = sum_row<C>(kLanes, [&](int64_t l) { return tile.sums[e][l]; });
  });
}

template <Score kScore, class S> void gate_block(const GateBackward<S>& p, int64_t block) {
  using C = Compute<S>;
  StackBuffers<C> stack;
  Tile<C> tile;
  const Buffers<C> buffers = stack.get(p, p.scratch, block);
  // Of the slots alone it is the same sum either way, and rows look at few logits.
  const bool of_slots =
      p.weighing.of_slots() && !p.grad_lse && !p.grad_score_sums && p.experts > kLanes;
  for_each_segment(p, block, [&](int64_t group, int64_t first, int64_t past) {
    if (in_tiles(p) && !of_slots)
      for (int64_t t = first; t < past; t += kLanes)
        gate_tile<kScore>(p, t, smaller(past - t, kLanes), group, tile);
    else
      for (int64_t t = first; t < past; ++t) gate_row<kScore>(p, t, group, buffers);
  });
}

}  // namespace

template <class S> void gate(const Gate<S>& p, int64_t begin, int64_t end) {
  with_score(p.weighing.score, [&]<Score kScore>() {
    for (int64_t block = begin; block < end; ++block) gate_block<kScore>(p, block);
  });
}

template <class C> void gate(const GateCombine<C>& p, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    const Blocks blocks = blocks_of(group_begin(p, group), group_end(p, group));
    p.group_tokens[group] = 0;
    for (int64_t block = blocks.first; block < blocks.past; ++block)
      p.group_tokens[group] += p.partial_tokens[block + group];
    for (int64_t e = 0; e < p.experts; ++e) {
      int64_t count = 0;
      double sum = 0;
      for (int64_t block = blocks.first; block < blocks.past; ++block) {
        const int64_t partial = (block + group) * p.experts + e;
        count += p.partial_counts[partial];
        if (p.score_sums) sum += p.partial_sums[partial];
      }
      p.counts[group * p.experts + e] = count;
      if (p.score_sums) p.score_sums[group * p.experts + e] = static_cast<C>(sum);
    }
  }
}

template <class S> void gate(const GateBackward<S>& p, int64_t begin, int64_t end) {
  with_score(p.weighing.score, [&]<Score kScore>() {
    for (int64_t block = begin; block < end; ++block) gate_block<kScore>(p, block);
  });
}

#define TORCH_ROUTERS_INSTANTIATE(S)                    \
  template void gate(const Gate<S>&, int64_t, int64_t); \
  template void gate(const GateBackward<S>&, int64_t, int64_t);
TORCH_ROUTERS_INSTANTIATE(float)
TORCH_ROUTERS_INSTANTIATE(double)
TORCH_ROUTERS_INSTANTIATE(BFloat16)
TORCH_ROUTERS_INSTANTIATE(Float16)
template void gate(const GateCombine<float>&, int64_t, int64_t);
template void gate(const GateCombine<double>&, int64_t, int64_t);

}  // namespace torch_routers::TORCH_ROUTERS_ISA
