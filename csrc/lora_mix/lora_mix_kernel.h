// What a sparse mixture of low-rank experts is made of. Tokens meet the experts that a plan gives
// them (see expert_plan_kernel.h); expert e has the rows [ranks[e], ranks[e + 1]) of a weight, its
// rank being their number, at most max_rank. For row r of the plan, of token t and expert e:
//
//   shrink   z[r][j] = <weight[ranks[e] + j], x[t]>                     0 for j >= the rank of e
//   expand   y[t]    = sum over slots of t, j   z[r][j] weight[ranks[e] + j]
//   outer    result[ranks[e] + j] = sum over the rows r of e   z[r][j] x[t]
//
// The gradients of each are the other two. A mixture is shrink by A, a product with the combine
// weights, and expand by the transposed B; neither x nor y is ever copied once per slot.
//
// Rows behind the last expert's have no token: shrink makes them 0, the others do not read them.
// Sums are in Compute<T>, rounded once, in an order that the sizes alone fix: those of expand go by
// slot, then by j; those of outer by row, on CUDA by batches of rows.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace torch_routers {

struct LoraRows {
  std::int64_t tokens, slots, experts, rows, features, max_rank;
  const std::int64_t* order;    // [rows]: token * slots + slot; -1: none
  const std::int64_t* inverse;  // [tokens, slots]: the row; -1: none
  const std::int64_t* offsets;  // [experts + 1]: the rows of each expert
  const std::int64_t* ranks;    // [experts + 1]: its rows of the weight
};

template <class T> struct LoraShrink : LoraRows {
  const T* x;       // [tokens, features]
  const T* weight;  // [ranks[experts], features]
  T* z;             // [rows, max_rank]
};

template <class T> struct LoraExpand : LoraRows {
  const T* z;       // [rows, max_rank]
  const T* weight;  // [ranks[experts], features]
  T* y;             // [tokens, features]; 0 for a token without rows
};

template <class T> struct LoraOuter : LoraRows {
  const T* z;  // [rows, max_rank]
  const T* x;  // [tokens, features]
  T* result;   // [ranks[experts], features]; 0 for an expert without rows
};

// The whole mixture where nothing is learned: every factor is read where it lies, and stacked nowhere.
// Rows are the selected slots, by expert and then by number. For row r, of token t and expert e:
//
//   z[r][j] = gates[slot of r] scaling[e] <a[e][j], x[t]>        rounded to T before the gate and after
//   y[t]    = sum over the rows r of t, j   z[r][j] b[e][:][j]   a running sum, by e, then by j
//
template <class T> struct LoraInfer {
  std::int64_t tokens, experts, in_features, features, max_rank;
  const std::int64_t* offsets;   // [experts + 1]: the rows of each expert
  const std::int64_t* ranks;     // [experts]; at most max_rank of those with rows
  const std::int64_t* token_of;  // [rows]
  const std::int64_t* slot_of;   // [rows]
  const T* x;                    // [tokens, in_features]
  const T* const* a;             // [experts]: [rank, in_features]; not looked at without rows
  const T* const* b;             // [experts]: [features, rank]; likewise
  const Compute<T>* gates;       // [slots of all tokens]
  const Compute<T>* scaling;     // [experts]; null: ones
  T* z;                          // scratch, [rows, max_rank]
  T* y;                          // [tokens, features]; 0 for a token without rows

  // What a thread needs for its features, of which it takes kWide at a time.
  static constexpr std::int64_t kWide = 64;
  constexpr std::int64_t scratch_size() const { return tokens * kWide + 16; }
};

// On the calling thread: the rows, the tokens and the features [begin, end). The token and the expert
// of each row are given, [rows]; those of rows behind the last expert's are not looked at.
TORCH_ROUTERS_FOR_EACH_ISA(
  template <class T>
  void lora_mix(const LoraShrink<T>&, const std::int64_t* tokens, std::int64_t begin,
                std::int64_t end);
  template <class T>
  void lora_mix(const LoraExpand<T>&, const std::int64_t* experts, std::int64_t begin,
                std::int64_t end);
  template <class T>
  void lora_mix(const LoraOuter<T>&, const std::int64_t* tokens, std::int64_t begin,
                std::int64_t end);
  // The two steps of LoraInfer: rows of z; then features of y, with scratch [scratch_size()].
  template <class T>
  void lora_infer_z(const LoraInfer<T>&, std::int64_t begin, std::int64_t end);
  template <class T>
  void lora_infer_y(const LoraInfer<T>&, Compute<T>* scratch, std::int64_t begin,
                    std::int64_t end);
)

template <class Params>
void lora_mix_cpu(const Params& params, const std::int64_t* of_row, std::int64_t begin,
                  std::int64_t end) {
  TORCH_ROUTERS_PICK_ISA(isa(), lora_mix(params, of_row, begin, end));
}

// All of it, queued on `stream` (a cudaStream_t) of the current device.
template <class T> void lora_mix_cuda(const LoraShrink<T>&, void* stream);
template <class T> void lora_mix_cuda(const LoraExpand<T>&, void* stream);
template <class T> void lora_mix_cuda(const LoraOuter<T>&, void* stream);

}  // namespace torch_routers
