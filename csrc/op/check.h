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
using OptionalTensor = std::optional<Tensor>;

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
inline void check_same_device(const char* op, const Tensor& first, const OptionalTensor& other) {
  if (other) check_same_device(op, first, *other);
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  check(tensor.scalar_type() == type, op, ": expected ", name, " in ", Dtype{type}, ", got ",
        dtype(tensor));
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor,
                             const char* first_name, const Tensor& first) {
  check(tensor.scalar_type() == first.scalar_type(), op, ": expected ", name, " in the dtype of ",
        first_name, ", ", dtype(first), ", got ", dtype(tensor));
}

// `fits`: whether the shape is the one that `words` describe.
template <class... Words>
void check_shape(const char* op, const char* name, const Tensor& tensor, bool fits,
                 const Words&... words) {
  check(fits, op, ": expected ", name, " of shape ", words..., ", got ", shape(tensor));
}

// Its dtype, its shape, and that it is where `first` is.
template <class... Words>
void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                  ScalarType type, bool fits, const Words&... words) {
  check_dtype(op, name, tensor, type);
  check_shape(op, name, tensor, fits, words...);
  check_same_device(op, first, tensor);
}

// Whether the shape is that of the ends of consecutive ranges, of which there is at least one.
inline bool is_offsets(const Tensor& tensor) { return tensor.dim() == 1 && tensor.size(0) >= 2; }

// What is in offsets on the CPU: they ascend from 0 to `last`, or at most there; `words` say so.
template <class... Words>
void check_offset_values(const char* op, const char* name, const Tensor& offsets, std::int64_t last,
                         bool at_most, const Words&... words) {
  const auto* values = static_cast<const std::int64_t*>(offsets.const_data_ptr());
  const std::int64_t ranges = offsets.size(0) - 1, end = values[ranges];
  check(values[0] == 0 && (at_most ? end <= last : end == last), op, ": expected ", name,
        " from 0 to ", words..., ", got ", values[0], " to ", end);
  for (std::int64_t r = 0; r < ranges; ++r)
    check(values[r] <= values[r + 1], op, ": expected ", name, " in ascending order, got ",
          values[r + 1], " after ", values[r]);
}

}  // namespace torch_routers
