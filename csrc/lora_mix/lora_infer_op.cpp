// `lora_mix` where nothing is learned, in one call: factors are not stacked first, but read where they
// lie. On the CPU alone.
#include <torch/csrc/stable/library.h>

#include "lora_mix/lora_infer_check.h"

namespace torch_routers {
namespace {

using std::int64_t;

constexpr int64_t kTokens = 512;  // at a time: their z and their sums stay in the cache

template <class T> void infer(LoraInputs& inputs, const std::vector<int64_t>& experts, T* y) {
  using C = Compute<T>;
  const int64_t slots = inputs.slots(), in_features = inputs.in_features();
  const int64_t features = inputs.features();
  std::vector<C> scaling;
  if (inputs.scaling) scaling.assign(inputs.scaling->begin(), inputs.scaling->end());
  const auto on_cuda = [](void*) {};  // where it is not registered
  for (int64_t first = 0; first < inputs.tokens(); first += kTokens) {
    const int64_t tokens = std::min(kTokens, inputs.tokens() - first);
    const LoraSelection rows(experts.data() + first * slots, tokens, slots, inputs.a);
    const auto a = inputs.places<T>(inputs.a, rows.offsets);
    const auto b = inputs.places<T>(inputs.b, rows.offsets);
    std::vector<T> z(rows.rows() * rows.max_rank);
    const LoraInfer<T> params{tokens,
                              inputs.experts(),
                              in_features,
                              features,
                              rows.max_rank,
                              rows.offsets.data(),
                              rows.ranks.data(),
                              rows.token_of.data(),
                              rows.slot_of.data(),
                              data<T>(inputs.x) + first * in_features,
                              a.data(),
                              b.data(),
                              data<C>(inputs.weights) + first * slots,
                              inputs.scaling ? scaling.data() : nullptr,
                              z.data(),
                              y + first * features};
    launch(
        inputs.x, rows.rows(), rows.max_rank * in_features,
        [&](int64_t begin, int64_t end) {
          TORCH_ROUTERS_PICK_ISA(isa(), lora_infer_z(params, begin, end));
        },
        on_cuda);
    launch(
        inputs.x, features, rows.rows() * rows.max_rank,
        [&](int64_t begin, int64_t end) {
          std::vector<C> scratch(params.scratch_size());
          TORCH_ROUTERS_PICK_ISA(isa(), lora_infer_y(params, scratch.data(), begin, end));
        },
        on_cuda);
  }
}

Tensor lora_infer(const Tensor& x, Tensors factors_a, Tensors factors_b, const Tensor& weights,
                  const OptionalTensor& indices, Scaling scaling) {
  LoraInputs inputs{"_lora_infer",        x,       weights,           std::move(factors_a),
                    std::move(factors_b), indices, std::move(scaling)};
  inputs.check_all();
  inputs.x = as_contiguous(x), inputs.weights = as_contiguous(weights);
  inputs.indices = contiguous(indices);
  const auto experts = inputs.experts_of_slots();
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = inputs.features();
  const Tensor y = allocate(x, sizes);
  dispatch_floating(inputs.op, "x", x,
                    [&]<class T>() { infer<T>(inputs, experts, mutable_data<T>(y)); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_routers, m) {
  m.def("_lora_infer(Tensor x, Tensor[] factors_a, Tensor[] factors_b, Tensor weights, "
        "Tensor? indices, float[]? scaling) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_routers, CPU, m) { m.impl("_lora_infer", TORCH_BOX(&lora_infer)); }

}  // namespace torch_routers
