// Vectors of the instruction set that a file is compiled for. What is computed with them must not
// depend on their width: lane by lane, or integers.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace torch_routers {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T> struct VectorOf {
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int kWidth = VectorOf<T>::kWidth;

template <class T> static inline Vector<T> load_vector(const T* from) {
  Vector<T> result;
  memcpy(&result, from, sizeof result);
  return result;
}
template <class T> static inline void store_vector(T* to, Vector<T> value) {
  memcpy(to, &value, sizeof value);
}

// Bit i: whether values[i] >= bound; 16 values.
static inline unsigned at_least(const std::int32_t* values, std::int32_t bound) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(values), _mm512_set1_epi32(bound));
#elif defined(__AVX2__)
  unsigned below = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 8 * half));
    const __m256i is_below = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), x);
    below |= static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(is_below))) << 8 * half;
  }
  return below ^ 0xffffu;
#else
  unsigned bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<unsigned>(values[i] >= bound) << i;
  return bits;
#endif
}
static inline unsigned at_least(const std::int64_t* values, std::int64_t bound) {
  unsigned bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<unsigned>(values[i] >= bound) << i;
  return bits;
}

}  // namespace torch_routers
