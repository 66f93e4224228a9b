// Arrays in the memory of the CPU, with the interface of DeviceArray: exact, so that sanitizers see
// each slip.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace torch_routers {

template <class T> class HostArray {
 public:
  explicit HostArray(std::size_t size) : values_(size) {
    std::fill_n(reinterpret_cast<unsigned char*>(values_.data()), size * sizeof(T), 0xfe);
  }
  explicit HostArray(const std::vector<T>& values) : values_(values) {}
  T* data() const { return const_cast<T*>(values_.data()); }
  std::vector<T> to_host() const { return values_; }

 private:
  std::vector<T> values_;
};

}  // namespace torch_routers
