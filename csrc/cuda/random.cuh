#pragma once
// Random words and numbers of consecutive elements: element_words and what is made of them in mtlkernels/random.py.

#include "../common/normal.h"
#include "../common/philox.h"

namespace mtlkernels {

/// The four words of elements 4 block .. 4 block + 3 of tensor `place`.
__device__ inline Philox element_words(uint64_t seed, uint32_t place, int64_t block) {
  return philox({{uint32_t(block), uint32_t(uint64_t(block) >> 32), place, 0}}, seed);
}

/// A uniform number in (0, 1) from a word: to_uniform of mtlkernels/random.py. Exact in float32.
__device__ inline float uniform(uint32_t word) { return (float(word >> 9) + 0.5f) * 0x1p-23f; }

/// The radius of a pair of standard normal numbers from its even word: element_normals of mtlkernels/random.py.
__device__ inline float normal_radius(uint32_t word) {
  const float uniform = (float(int32_t(word >> 1)) + 0.5f) * 0x1p-31f;
  const int32_t bits = __float_as_int(uniform) - kRootHalf;
  const float fraction = __int_as_float((bits & 0x7fffff) + kRootHalf) - 1.0f;
  return __fsqrt_rn(float(bits >> 23) * kLog2 + fraction * log_polynomial(fraction));
}

/// The cosine of the angle that a word names, in units of 2^-32 turns.
__device__ inline float normal_cosine(uint32_t word) {
  const uint32_t size = int32_t(word) < 0 ? 0u - word : word;
  const float height = float(int32_t(kQuarterTurn - size)) * 0x1p-31f;
  return height * sine_polynomial(height * height);
}

/// Uniform numbers of `lanes` consecutive elements from e on, a multiple of min(lanes, 4).
template <int lanes>
__device__ inline void uniforms(uint64_t seed, uint32_t place, int64_t e, float (&to)[lanes]) {
#pragma unroll
  for (int first = 0; first < lanes; first += 4) {
    const Philox words = element_words(seed, place, (e + first) / 4);
#pragma unroll
    for (int i = 0; i < 4 && first + i < lanes; ++i)
      to[first + i] = uniform(lanes >= 4 || (e & 2) == 0 ? words.word[i] : words.word[(i + 2) % 4]);
  }
}

}  // namespace mtlkernels
