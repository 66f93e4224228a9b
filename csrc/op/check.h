// Argument checks of the operators: a value, shape, dtype or device that does not fit is a
// ValueError in Python that reads "<op>: expected <argument> <condition>, got <value>". RuntimeError
// is left to what no argument can mend: the environment, a launch that fails.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>

namespace torch_routers {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Words> void check(bool condition, const Words&... words) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::invalid_argument(message.str());
}

struct Shape {
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
  friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    out << '[';
    for (std::size_t d = 0; d < shape.sizes.size(); ++d) out << (d ? ", " : "") << shape.sizes[d];
    return out << ']';
  }
};

inline Shape shape(const Tensor& tensor) { return {tensor.sizes()}; }

inline bool has_shape(const Tensor& tensor, std::initializer_list<std::int64_t> sizes) {
  const auto actual = tensor.sizes();
  return std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end());
}

struct DeviceName {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& out, const DeviceName& device) {
    if (!device.tensor.is_cuda()) return out << (device.tensor.is_cpu() ? "cpu" : "another device");
    return out << "cuda:" << device.tensor.get_device_index();
  }
};

// The tensors of a call are where the first one is: the dispatcher looks at one device only.
inline void check_same_device(const char* op, const Tensor& first, const Tensor& other) {
  check(other.device() == first.device(), op, ": expected all tensors on ", DeviceName{first},
        ", got one on ", DeviceName{other});
}
inline void check_same_device(const char* op, const Tensor& first,
                              const std::optional<Tensor>& other) {
  if (other) check_same_device(op, first, *other);
}

}  // namespace torch_routers
