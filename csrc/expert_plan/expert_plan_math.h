// What the CPU and the CUDA kernels of expert_plan share.
#pragma once

#include "common/scalar.h"

namespace torch_routers {

// Whether a weight is other than 0, by its bits: a machine told to flush subnormal numbers to zero
// compares them equal to 0.
TORCH_ROUTERS_HOST_DEVICE static inline bool is_live(float weight) {
  return (bit_cast<std::uint32_t>(weight) << 1) != 0;
}
TORCH_ROUTERS_HOST_DEVICE static inline bool is_live(double weight) {
  return (bit_cast<std::uint64_t>(weight) << 1) != 0;
}
TORCH_ROUTERS_HOST_DEVICE static inline bool is_live(BFloat16 weight) {
  return (weight.bits & 0x7fff) != 0;
}
TORCH_ROUTERS_HOST_DEVICE static inline bool is_live(Float16 weight) {
  return (weight.bits & 0x7fff) != 0;
}

}  // namespace torch_routers
