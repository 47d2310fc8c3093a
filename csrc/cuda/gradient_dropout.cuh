#pragma once
// Gradient dropout: a gradient times noise of mean 1. The gradient is read once, the result written once; the rate and the seed
// stay on the device.
//
// In float32 (float64 for float64), compiled without fused multiply-adds, as every backend does it: all give the same bits. The
// result may be the gradient.

#include "../common/gradient_dropout.h"
#include "../common/launch_plan.h"
#include "random.cuh"
#include "vec.cuh"

namespace mtlkernels {

constexpr int kNoiseThreads = 256;
constexpr int kNoisePointers = 3;  // of a tensor: the gradient, the result, the tensor's index in the list as an integer

/// What the noise of one tensor is made of.
template <typename S, bool gaussian>
struct NoiseSource {
  const NoiseLevel<S> level;
  const uint64_t seed;
  const uint32_t place;

  __device__ S factor(float draw) const { return level.base + level.scale * S(draw); }
  __device__ float kept(uint32_t word) const { return word < level.threshold ? 0.0f : 1.0f; }

  /// Draws of `lanes` consecutive elements from e on, a multiple of min(lanes, 4).
  template <int lanes>
  __device__ void draws(int64_t e, float (&to)[lanes]) const {
#pragma unroll
    for (int first = 0; first < lanes; first += 4) {
      const Philox words = element_words(seed, place, (e + first) / 4);
      const bool later = lanes < 4 && (e & 2) != 0;
#pragma unroll
      for (int i = 0; i < 4 && first + i < lanes; i += 2) {
        const uint32_t even = later ? words.word[2] : words.word[i], odd = later ? words.word[3] : words.word[i + 1];
        if constexpr (gaussian) {
          const float radius = normal_radius(even);
          to[first + i] = radius * normal_cosine(odd);
          to[first + i + 1] = radius * normal_cosine(odd - kQuarterTurn);
        } else {
          to[first + i] = kept(even);
          to[first + i + 1] = kept(odd);
        }
      }
    }
  }

  /// The draw of one element.
  __device__ float draw(int64_t e) const {
    const Philox words = element_words(seed, place, e / 4);
    const uint32_t even = e & 2 ? words.word[2] : words.word[0], odd = e & 2 ? words.word[3] : words.word[1];
    if constexpr (gaussian) return normal_radius(even) * normal_cosine(odd - (e & 1 ? kQuarterTurn : 0));
    return kept(e & 1 ? odd : even);
  }
};

/// One block per chunk of kDeviceChunk elements.
template <typename T, bool gaussian>
__global__ void __launch_bounds__(kNoiseThreads)
    gradient_dropout(const __grid_constant__ TensorTable table, const double* rate, const int64_t* seeds) {
  using S = Sum<T>;
  constexpr int batch = kBatch<1>;
  constexpr int64_t step = kNoiseThreads * kLanes<T>;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  void* const* pointers = table.pointers(chunk.tensor);
  const T* grad = static_cast<const T*>(pointers[0]);
  T* out = static_cast<T*>(pointers[1]);
  const NoiseSource<S, gaussian> source{NoiseLevel<S>(*rate, gaussian), uint64_t(*seeds),
                                        uint32_t(reinterpret_cast<uintptr_t>(pointers[2]))};
  const bool aligned = is_aligned(grad) && is_aligned(out);
  const int64_t vectors_end = aligned ? chunk.begin + (chunk.end - chunk.begin) / kLanes<T> * kLanes<T> : chunk.begin;
#pragma unroll 1
  for (int64_t e = chunk.begin + threadIdx.x * kLanes<T>; e < vectors_end; e += batch * step) {
    Packed<T> packed[batch];  // not through the read-only cache: may be the result
#pragma unroll
    for (int b = 0; b < batch; ++b)
      if (e + b * step < vectors_end) packed[b].raw = *reinterpret_cast<const uint4*>(grad + e + b * step);
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (e + b * step >= vectors_end) continue;
      float draws[kLanes<T>];
      source.draws(e + b * step, draws);
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane)
        narrow(S(widen(packed[b].values[lane])) * source.factor(draws[lane]), packed[b].values[lane]);
      store_packed(out + e + b * step, packed[b]);
    }
  }
#pragma unroll 1
  for (int64_t e = vectors_end + threadIdx.x; e < chunk.end; e += kNoiseThreads)
    narrow(S(widen(grad[e])) * source.factor(source.draw(e)), out[e]);
}

}  // namespace mtlkernels
