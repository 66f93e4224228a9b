// From a tensor to the kernel of its scalar type and device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/scalar.h"
#include "op/check.h"

namespace torch_routers {

// Calls body.operator()<T>() with the scalar type T of `tensor`.
template <class Body>
void dispatch_float_double(const char* op, const char* argument, const Tensor& tensor,
                           const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::Double: return body.template operator()<double>();
    default:
      check(false, op, ": expected ", argument, " in float32 or float64, got ", dtype(tensor),
            ". Convert it with .float()");
  }
}

// The same for float32, float64, bfloat16 and float16.
template <class Body>
void dispatch_floating(const char* op, const char* argument, const Tensor& tensor,
                       const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::BFloat16: return body.template operator()<BFloat16>();
    case ScalarType::Half: return body.template operator()<Float16>();
    default:
      check(false, op, ": expected ", argument, " in float32, float64, bfloat16 or float16, got ",
            dtype(tensor));
  }
}

inline void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  dispatch_floating(op, argument, tensor, []<class T> {});
}

// False in the fork of a process that used torch's threads: they are not there, and to wait for them
// would be for ever.
inline bool has_threads() {
  static std::atomic<pid_t> first_user{0};
  const pid_t self = getpid();
  pid_t user = 0;
  return first_user.compare_exchange_strong(user, self) || user == self;
}

// Calls cpu(begin, end) over ranges of [0, count) on torch's threads, or cuda(stream) once,
// depending on where `tensor` lives. `cost`, in elements, of one decides how many a thread is worth.
template <class Cpu, class Cuda>
void launch(const Tensor& tensor, std::int64_t count, std::int64_t cost, const Cpu& cpu,
            [[maybe_unused]] const Cuda& cuda) {
  constexpr std::int64_t kElementsPerThread = 32768;
  if (tensor.is_cpu()) {
    const auto grain =
        std::max<std::int64_t>(1, kElementsPerThread / std::max<std::int64_t>(1, cost));
    if (count > grain && !has_threads()) return cpu(0, count);
    return torch::stable::parallel_for(0, count, grain, cpu);
  }
#ifdef TORCH_ROUTERS_WITH_CUDA
  const auto device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  cuda(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#endif
}

// The elements; null for a tensor that is not there.
template <class T> const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T> const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <class T> T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T> T* mutable_data(const OptionalTensor& tensor) {
  return tensor ? mutable_data<T>(*tensor) : nullptr;
}

// An uninitialised tensor where `like` is, contiguous; in its dtype by default. (torch::stable::new_empty goes through the
// dispatcher twice, which costs more than a small kernel.)
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t step = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<std::int64_t>(1, sizes[d]);
  }
  std::int32_t device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<std::int32_t>(
          torch::stable::detail::from(dtype.value_or(like.scalar_type()))),
      device, index, &handle));
  return Tensor(handle);
}

// Where nothing is to be done nothing is called, which saves two microseconds.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? std::optional(as_contiguous(*tensor)) : std::nullopt;
}

}  // namespace torch_routers
