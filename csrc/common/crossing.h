// Whether an expert belongs to those whose probabilities are summed up to a limit.
#pragma once

#include "common/scalar.h"

namespace torch_routers {

// Of the expert that makes the sum cross the limit. Values: those of the operators' arguments, in the
// order of the names in Python.
enum class Crossing : std::int64_t { Below, Reaching, Exceeding };

// before, with: the sums without and with it.
template <class T>
TORCH_ROUTERS_HOST_DEVICE static inline bool is_within(Crossing crossing, T before, T with,
                                                       T limit) {
  return crossing == Crossing::Below      ? with <= limit
         : crossing == Crossing::Reaching ? before < limit
                                          : before <= limit;
}

}  // namespace torch_routers
