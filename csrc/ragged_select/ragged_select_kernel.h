// How many of its experts a token keeps. They come in descending order of the logits z; with
// p = softmax(z) over all experts, c_j the sum of p over the first j, and E experts:
//
//   TopP        those whose c_j <= top_p (Below); whose c_{j-1} < top_p (Reaching), or <= top_p
//               (Exceeding)
//   Entropy     counts[i], i of the thresholds being <= -sum p ln p
//   Confidence  counts[i], i of the thresholds being <= the largest p
//   Positive    those with z > 0
//
// but no fewer than least. Slots behind them become -1; a slot that is -1 stays so. NaN is never <=,
// and a row with NaN in it keeps by TopP the least, by Entropy and Confidence counts[0].
//
// All arrays are dense and row-major. Tokens do not depend on each other.
#pragma once

#include <cstdint>

#include "common/crossing.h"
#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

// Values: those of the operator's arguments, in the order of the names in Python.
enum class RaggedRule : std::int64_t { TopP, Entropy, Confidence, Positive };

template <class T> struct RaggedSelect {
  std::int64_t tokens, experts, slots;
  const T* logits;            // [tokens, experts]
  const std::int64_t* order;  // [tokens, slots]: experts, the largest logits first; -1: none
  RaggedRule rule;
  double top_p;
  Crossing crossing;
  std::int64_t least;
  std::int64_t steps;          // thresholds
  const double* thresholds;    // [steps], ascending
  const std::int64_t* counts;  // [steps + 1]
  std::int64_t* indices;       // [tokens, slots]
};

// Tokens [begin, end) on the calling thread.
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T> void ragged_select(const RaggedSelect<T>&, std::int64_t begin,
                                        std::int64_t end);
)

template <class T>
void ragged_select_cpu(const RaggedSelect<T>& params, std::int64_t begin, std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), ragged_select(params, begin, end));
}

// All tokens, queued on `stream` (a cudaStream_t) of the current device.
template <class T> void ragged_select_cuda(const RaggedSelect<T>&, void* stream);

}  // namespace torch_routers
