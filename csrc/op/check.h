// Argument checks of the operators: a value, shape, dtype or device that does not fit is a
// ValueError in Python that reads "<op>: expected <argument> <condition>, got <value>". RuntimeError
// is left to what no argument can mend: the environment, a launch that fails.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
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

// A dtype under the name that it has in Python.
struct Dtype {
  ScalarType type;
  friend std::ostream& operator<<(std::ostream& out, const Dtype& dtype) {
    switch (dtype.type) {
      case ScalarType::Float: return out << "float32";
      case ScalarType::Double: return out << "float64";
      case ScalarType::Half: return out << "float16";
      case ScalarType::BFloat16: return out << "bfloat16";
      case ScalarType::Bool: return out << "bool";
      case ScalarType::Byte: return out << "uint8";
      case ScalarType::Char: return out << "int8";
      case ScalarType::Short: return out << "int16";
      case ScalarType::Int: return out << "int32";
      case ScalarType::Long: return out << "int64";
      case ScalarType::ComplexFloat: return out << "complex64";
      case ScalarType::ComplexDouble: return out << "complex128";
      default: return out << torch::headeronly::toString(dtype.type);
    }
  }
};

inline Dtype dtype(const Tensor& tensor) { return {tensor.scalar_type()}; }

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
