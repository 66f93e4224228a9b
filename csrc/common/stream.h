// Writing what the caches cannot hold: past them, so that memory is not read before it is written.
// (AVX has wider instructions for it; memory, not they, is the limit.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace torch_routers {

// Results of so many bytes are better streamed: half of a usual last cache.
constexpr std::int64_t kStreamBytes = std::int64_t{16} << 20;

// As memcpy. Call stream_fence() after the last of a thread's copies.
static inline void stream_copy(void* to, const void* from, std::size_t bytes) {
#if defined(__SSE2__)
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  const std::size_t to_aligned = -reinterpret_cast<std::uintptr_t>(target) % 16;
  const std::size_t head = to_aligned < bytes ? to_aligned : bytes;
  memcpy(target, source, head);
  std::size_t i = head;
  for (; i + 16 <= bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  memcpy(target + i, source + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

// Orders the copies before whatever tells other threads that they are done.
static inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace torch_routers
