// Vectors of the instruction set that a file is compiled for. What is computed with them must not
// depend on their width: lane by lane, or integers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/scalar.h"

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

// An element, or as many as a vector has, of what is stored as S; V says which.
template <class V, class S> static inline V read(const S* from) {
  if constexpr (sizeof(V) == sizeof(Compute<S>)) {
    return load(*from);
  } else {
    Compute<S> values[kWidth<Compute<S>>];
    for (int i = 0; i < kWidth<Compute<S>>; ++i) values[i] = load(from[i]);
    return load_vector(values);
  }
}
template <class V, class S> static inline void write(S* to, V value) {
  if constexpr (sizeof(V) == sizeof(Compute<S>)) {
    store(to, value);
  } else {
    Compute<S> values[kWidth<Compute<S>>];
    store_vector(values, value);
    for (int i = 0; i < kWidth<Compute<S>>; ++i) store(to + i, values[i]);
  }
}

// a[0], b[0], a[1], b[1], and the same of the upper halves. (GCC and Clang have names of their own.)
typedef float FourFloats __attribute__((vector_size(16)));
static inline FourFloats interleave_low(FourFloats a, FourFloats b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#else
  typedef std::int32_t Places __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Places{0, 4, 1, 5});
#endif
}
static inline FourFloats interleave_high(FourFloats a, FourFloats b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  typedef std::int32_t Places __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Places{2, 6, 3, 7});
#endif
}

// to[c * to_stride + r] = from[r * from_stride + c] for four rows of four.
static inline void transpose_4x4(const float* from, std::int64_t from_stride, float* to,
                                 std::int64_t to_stride) {
  FourFloats rows[4];
  for (int r = 0; r < 4; ++r) memcpy(&rows[r], from + r * from_stride, sizeof rows[r]);
  const FourFloats low02 = interleave_low(rows[0], rows[2]),
                   low13 = interleave_low(rows[1], rows[3]),
                   high02 = interleave_high(rows[0], rows[2]),
                   high13 = interleave_high(rows[1], rows[3]);
  const FourFloats columns[4] = {interleave_low(low02, low13), interleave_high(low02, low13),
                                 interleave_low(high02, high13), interleave_high(high02, high13)};
  for (int c = 0; c < 4; ++c) memcpy(to + c * to_stride, &columns[c], sizeof columns[c]);
}

// Appends those of 16 keys that are not below `bound` to `kept`, and their indices, of which the
// first is `index`, to `indices`; returns how many. What is behind those may be overwritten.
template <class Key>
static inline int keep_at_least(const Key* keys, Key bound, std::int32_t index, Key* kept,
                                std::int32_t* indices) {
  int count = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Key) == 4) {
    const __m512i all = _mm512_loadu_si512(keys);
    const __mmask16 bits = _mm512_cmpge_epi32_mask(all, _mm512_set1_epi32(bound));
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(index));
    _mm512_storeu_si512(kept, _mm512_maskz_compress_epi32(bits, all));
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(bits, places));
    return __builtin_popcount(bits);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Key) == 4) {
    for (int half = 0; half < 16; half += 8) {
      const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + half));
      const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), all);
      unsigned bits = ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(below))) & 255;
      for (; bits; bits &= bits - 1, ++count) {
        const int i = half + __builtin_ctz(bits);
        kept[count] = keys[i];
        indices[count] = index + i;
      }
    }
    return count;
  }
#endif
  for (int i = 0; i < 16; ++i) {  // written at once, and kept by moving on
    kept[count] = keys[i];
    indices[count] = index + i;
    count += keys[i] >= bound;
  }
  return count;
}

}  // namespace torch_routers
