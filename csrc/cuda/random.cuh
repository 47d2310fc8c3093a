#pragma once
// Random words of consecutive elements: element_words of mtlkernels/random.py.

#include "../common/philox.h"

namespace mtlkernels {

/// The four words of elements 4 block .. 4 block + 3 of tensor `place`.
__device__ inline Philox element_words(uint64_t seed, uint32_t place, int64_t block) {
  return philox({{uint32_t(block), uint32_t(uint64_t(block) >> 32), place, 0}}, seed);
}

/// A uniform number in (0, 1) from a word: to_uniform of mtlkernels/random.py. Exact in float32.
__device__ inline float uniform(uint32_t word) { return (float(word >> 9) + 0.5f) * 0x1p-23f; }

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
