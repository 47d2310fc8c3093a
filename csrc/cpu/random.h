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

/// Stores the words of the even counters, then those of the odd ones: of each the upper and the lower half of `first`, then of
/// `second`.
inline void store_words(uint32_t* to, CounterVector first, CounterVector second) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, _mm512_shuffle_ps((__m512)first, (__m512)second, 0x11));
  _mm512_storeu_ps(to + 16, _mm512_shuffle_ps((__m512)first, (__m512)second, 0xbb));
#elif defined(__AVX2__)
  _mm256_storeu_ps((float*)to, _mm256_shuffle_ps((__m256)first, (__m256)second, 0x11));
  _mm256_storeu_ps((float*)to + 8, _mm256_shuffle_ps((__m256)first, (__m256)second, 0xbb));
#else
  for (int i = 0; i < kCounters; ++i) {
    const CounterVector halves[2] = {first << 32 | first >> 32, second << 32 | second >> 32};
    uint32_t* own = to + 4 * (i / 2 + i % 2 * (kCounters / 2));
    for (int w = 0; w < 2; ++w) __builtin_memcpy(own + 2 * w, (const char*)&halves[w] + 8 * i, 8);
  }
#endif
}

constexpr int64_t kDraw = 8 * kCounters;  // words drawn at a time

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

  /// Those of elements [begin, begin + kDraw); begin is a multiple of kDraw.
  void draw(int64_t begin, uint32_t* to) const;

 private:
  CounterVector keys_[10][2];
  const uint32_t place_;
};

/// Only the first word of a counter differs from element to element, so that two of the first rounds' multiplications are of
/// scalars: 18 of vectors are left of 20.
inline __attribute__((noinline)) void Words::draw(int64_t begin, uint32_t* to) const {
  constexpr uint64_t kFirst = 0xD2511F53, kSecond = 0xCD9E8D57;
  const CounterVector first = CounterVector{} + kFirst, second = CounterVector{} + kSecond;
  const uint64_t of_place = kSecond * place_;
  CounterVector lane;
  for (int i = 0; i < kCounters; ++i) lane[i] = uint64_t(i / 2 + i % 2 * (kCounters / 2));
  const uint64_t block = uint64_t(begin) / 4;
  // After round 0: words a and b, which are those of every lane, and a's product in round 1.
  const uint32_t same_a = uint32_t(of_place >> 32) ^ uint32_t(block >> 32) ^ uint32_t(keys_[0][0][0]),
                 same_b = uint32_t(of_place);
  const uint64_t of_a = kFirst * same_a;
  const CounterVector flip_a = keys_[1][0] ^ same_b, flip_c = keys_[1][1] ^ (of_a >> 32),
                      flip_next = keys_[2][1] ^ uint32_t(of_a);
  CounterVector a[2], b[2], c[2], d[2];  // upper halves hold what is left of the products; nothing reads them
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const CounterVector zero = multiply(lane + (block + v * kCounters), first),
                        one = multiply(upper(zero) ^ keys_[0][1], second);
    a[v] = upper(one) ^ flip_a;
    b[v] = one;
    c[v] = zero ^ flip_c;
    const CounterVector low = multiply(a[v], first), high = multiply(c[v], second);
    a[v] = upper(high) ^ b[v] ^ keys_[2][0];
    b[v] = high;
    c[v] = upper(low) ^ flip_next;
    d[v] = low;
  }
#pragma GCC unroll 6
  for (int round = 3; round < 9; ++round) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const CounterVector low = multiply(a[v], first), high = multiply(c[v], second);
      a[v] = upper(high) ^ b[v] ^ keys_[round][0];
      b[v] = high;
      c[v] = upper(low) ^ d[v] ^ keys_[round][1];
      d[v] = low;
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {  // the last round in the products' upper halves, whose lower ones are words b and d
    const CounterVector low = multiply(a[v], first), high = multiply(c[v], second);
    store_words(to + 4 * v * kCounters, high ^ (b[v] ^ keys_[9][0]) << 32, low ^ (d[v] ^ keys_[9][1]) << 32);
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
