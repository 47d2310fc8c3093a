#pragma once
// Random words and numbers of consecutive elements, a vector at a time: element_words and what is made of them in
// mtlkernels/random.py.

#include "../common/normal.h"
#include "../common/philox.h"
#include "vector.h"

namespace mtlkernels::cpu {
namespace {

typedef uint64_t CounterVector __attribute__((vector_size(kVectorBytes)));  // of counters: a word of each, in the lower half
constexpr int kCounters = kVectorBytes / 8;

/// The 64-bit products of the lower halves.
inline CounterVector multiply(CounterVector a, CounterVector b) {
#if defined(__AVX512F__)
  return (CounterVector)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (CounterVector)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (CounterVector)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

/// Stores a[0], b[0], a[1], b[1], ...
inline void store_interleaved(uint32_t* to, CounterVector a, CounterVector b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64((__m512i)a, low, (__m512i)b));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64((__m512i)a, high, (__m512i)b));
#elif defined(__AVX2__)
  const __m256i even = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b), odd = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256((__m256i*)(to + 8), _mm256_permute2x128_si256(even, odd, 0x31));
#else
  for (int i = 0; i < kCounters; ++i) {
    __builtin_memcpy(to + 4 * i, (const char*)&a + 8 * i, 8);
    __builtin_memcpy(to + 4 * i + 2, (const char*)&b + 8 * i, 8);
  }
#endif
}

constexpr int64_t kWordsBeyond = 8 * kCounters;  // than asked for that are written, at most

/// The upper halves in the place of the lower.
inline CounterVector upper(CounterVector a) {
#if defined(__AVX512F__)
  return (CounterVector)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);
#else
  return a >> 32;
#endif
}

/// The words of a tensor's elements, with the keys of all rounds laid out.
class Words {
 public:
  Words(uint64_t seed, uint32_t place) : place_(place) {
    uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      keys_[round][0] = CounterVector{} + low;
      keys_[round][1] = CounterVector{} + high;
    }
  }

  /// Those of elements [begin, begin + count); begin is a multiple of 4. Up to kWordsBeyond more are written.
  void fill(int64_t begin, int64_t count, uint32_t* to) const;

 private:
  CounterVector keys_[10][2];
  const uint32_t place_;
};

inline void Words::fill(int64_t begin, int64_t count, uint32_t* to) const {
  const CounterVector first = CounterVector{} + 0xD2511F53ull, second = CounterVector{} + 0xCD9E8D57ull;
  CounterVector lane;
  for (int i = 0; i < kCounters; ++i) lane[i] = uint64_t(i);
  for (int64_t at = 0; at < count; at += 8 * kCounters) {  // two vectors at a time, so that one's multiplications overlap
    CounterVector a[2], b[2], c[2], d[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const CounterVector block = lane + uint64_t((begin + at) / 4 + v * kCounters);
      a[v] = block;
      b[v] = block >> 32;
      c[v] = CounterVector{} + place_;
      d[v] = CounterVector{};
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {  // upper halves hold what is left of the products; nothing reads them
        const CounterVector low = multiply(a[v], first), high = multiply(c[v], second);
        a[v] = upper(high) ^ b[v] ^ keys_[round][0];
        b[v] = high;
        c[v] = upper(low) ^ d[v] ^ keys_[round][1];
        d[v] = low;
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      store_interleaved(to + at + 4 * v * kCounters, (a[v] & 0xffffffff) | b[v] << 32, (c[v] & 0xffffffff) | d[v] << 32);
  }
}

typedef uint32_t WordVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t HalfWordVector __attribute__((vector_size(kVectorBytes / 2)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t HalfIntVector __attribute__((vector_size(kVectorBytes / 2)));

/// Uniform numbers in (0, 1) from a vector of words: to_uniform of mtlkernels/random.py. Exact, whatever is contracted.
inline FloatVector uniforms(const uint32_t* words, float) {
  return (__builtin_convertvector((IntVector)(load<WordVector>(words) >> 9), FloatVector) + 0.5f) * 0x1p-23f;
}
inline DoubleVector uniforms(const uint32_t* words, double) {
  return (__builtin_convertvector((HalfIntVector)(load<HalfWordVector>(words) >> 9), DoubleVector) + 0.5) * 0x1p-23;
}

/// Rounded to nearest.
inline FloatVector square_root(FloatVector value) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
  return (FloatVector)_mm256_sqrt_ps((__m256)value);
#elif defined(__SSE2__)
  return (FloatVector)_mm_sqrt_ps((__m128)value);
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
  return value;
#endif
}

/// Standard normal numbers of a vector of words, which begins with an even element: element_normals of mtlkernels/random.py.
inline FloatVector normal(WordVector words) {
  const CounterVector pairs = (CounterVector)words;
  const WordVector even = (WordVector)((pairs & 0xffffffff) | pairs << 32);  // a pair's even word in both of its lanes
  const WordVector odd = (WordVector)(pairs >> 32 | (pairs & ~0xffffffffull));
  const FloatVector uniform = (__builtin_convertvector((IntVector)(even >> 1), FloatVector) + 0.5f) * 0x1p-31f;
  const IntVector bits = (IntVector)uniform - kRootHalf;
  const FloatVector exponent = __builtin_convertvector(bits >> 23, FloatVector);
  const FloatVector fraction = (FloatVector)((bits & 0x7fffff) + kRootHalf) - 1.0f;
  const FloatVector radius = square_root(exponent * kLog2 + fraction * log_polynomial(fraction));
  const WordVector turn = odd - (WordVector)(CounterVector{} + (uint64_t(kQuarterTurn) << 32));
  const WordVector sign = (WordVector)((IntVector)turn >> 31);  // all ones where negative
  const WordVector size = (turn ^ sign) - sign;
  const FloatVector height = __builtin_convertvector((IntVector)(kQuarterTurn - size), FloatVector) * 0x1p-31f;
  return radius * (height * sine_polynomial(height * height));
}

/// Those of the words, float in their place; whole vectors, from an even element on.
inline void normals(int64_t count, uint32_t* words) {
  for (int64_t e = 0; e < count; e += kLanes<float>) store(words + e, normal(load<WordVector>(words + e)));
}

}  // namespace
}  // namespace mtlkernels::cpu
