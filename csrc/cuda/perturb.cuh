#pragma once
// The ascent of sharpness-aware minimisation, out[e] = a[e] + r b[e], or a[e] + r a[e]^2 b[e] for the adaptive one. Each row is
// read once, the result written once; the radius r stays on the device.
//
// Computed in float32 (float64 for float64), rounded to the rows' dtype at the end. The order (r a) b a keeps every factor
// within range: |r a b| is at most the radius of the perturbation. The result may be one of the rows.

#include "../common/launch_plan.h"
#include "vec.cuh"

namespace mtlkernels {

constexpr int kPerturbThreads = 256;
constexpr int kPerturbPointers = 4;  // of a tensor: a, b, the result, the radius (float64)

template <typename S>
__device__ inline S ascended(S value, S grad, S radius, bool adaptive) {
  return value + (adaptive ? radius * value * grad * value : radius * grad);
}

/// One block per chunk of kDeviceChunk elements.
template <typename T>
__global__ void __launch_bounds__(kPerturbThreads) perturb(const __grid_constant__ TensorTable table, bool adaptive) {
  using S = Sum<T>;
  constexpr int batch = kBatch<2>;
  constexpr int64_t step = kPerturbThreads * kLanes<T>;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  void* const* pointers = table.pointers(chunk.tensor);
  const T *a = static_cast<const T*>(pointers[0]), *b = static_cast<const T*>(pointers[1]);
  T* out = static_cast<T*>(pointers[2]);
  const S radius = S(*static_cast<const double*>(pointers[3]));
  const bool aligned = is_aligned(a) && is_aligned(b) && is_aligned(out);
  const int64_t vectors_end = aligned ? chunk.begin + (chunk.end - chunk.begin) / kLanes<T> * kLanes<T> : chunk.begin;
#pragma unroll 1
  for (int64_t e = chunk.begin + threadIdx.x * kLanes<T>; e < vectors_end; e += batch * step) {
    Packed<T> rows[batch][2];  // not through the read-only cache: either may be the result
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (e + i * step >= vectors_end) continue;
      rows[i][0].raw = *reinterpret_cast<const uint4*>(a + e + i * step);
      rows[i][1].raw = *reinterpret_cast<const uint4*>(b + e + i * step);
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      Packed<T> packed;
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane)
        narrow(ascended(S(widen(rows[i][0].values[lane])), S(widen(rows[i][1].values[lane])), radius, adaptive),
               packed.values[lane]);
      if (e + i * step < vectors_end) store_packed(out + e + i * step, packed);
    }
  }
#pragma unroll 1
  for (int64_t e = vectors_end + threadIdx.x; e < chunk.end; e += kPerturbThreads)
    narrow(ascended(S(widen(a[e])), S(widen(b[e])), radius, adaptive), out[e]);
}

}  // namespace mtlkernels
