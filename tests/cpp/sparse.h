// Arrays of any size of which only the pages that are touched take memory: what is beyond 2^31
// elements can be tested on any machine.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace torch_routers {

template <class T> class Sparse {
 public:
  explicit Sparse(std::int64_t size) : bytes_(size * sizeof(T)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Sparse() {
    if (*this) munmap(memory_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;

  // False where the system limits what may be mapped.
  explicit operator bool() const { return memory_ != MAP_FAILED; }
  T* data() const { return static_cast<T*>(memory_); }

 private:
  std::size_t bytes_;
  void* memory_;
};

}  // namespace torch_routers
