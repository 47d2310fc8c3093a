#pragma once
// The excess risk of a task, sum_e h^2 / sqrt(S + h^2 + epsilon) with h = factor g: gradient and memory S are read once,
// nothing but a sum for each chunk is written. Stage two, which adds the chunks in order, is gram's with one row.
//
// Terms and a chunk's sum are float32 (float64 beside float64 gradients). A term is h (h / root), whose second factor is at
// most 1: nothing but the root's square can overflow, and where it does the term is made NaN. A chunk whose sum is not finite,
// or so small that terms underflowed, is summed again in float64, and so is every chunk where factor or epsilon leave float32's
// range.

#include "../common/launch_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace mtlkernels {

constexpr int kExcessThreads = 256;
constexpr int kExcessPointers = 4;  // of a tensor: gradient, memory, factor and sums (both float64)
constexpr int kExcessBatch = 4;     // vectors of both rows that a thread loads at a time

__device__ inline float excess(float h, float memory, float epsilon) {
  const float square = h * h + (memory + epsilon);
  return h * (h * rsqrtf(square)) + (square - square);  // plus 0, or NaN where the square is not finite
}

__device__ inline double excess(double h, double memory, double epsilon) {
  const double square = h * h;
  return square / sqrt(memory + square + epsilon);
}

/// A gradient with its memory, and what its elements add to the risk as an S.
template <typename T, typename S>
struct ExcessRow {
  const T* grad;
  const Sum<T>* memory;
  S factor, epsilon;

  __device__ double operator[](int64_t e) const { return double(widen(grad[e])); }  // of the gradient
  __device__ S term(T g, Sum<T> kept) const { return excess(factor * S(widen(g)), S(kept), epsilon); }
};

/// The sum over elements [begin, end), up to `vectors_end` in vectors, in `total`.
/// Contract: all threads of the block call it; `scratch` holds an S per warp and `total` is in shared memory, valid in every
/// thread on return; two barriers.
template <typename T, typename S>
__device__ inline void excess_of_chunk(const ExcessRow<T, S>& row, int64_t begin, int64_t vectors_end, int64_t end, S* scratch,
                                       double* total) {
  using Few = Beside<T>;
  constexpr int64_t step = kExcessThreads * Few::lanes;
  S sum[1] = {0};
#pragma unroll 1
  for (int64_t e = begin + threadIdx.x * Few::lanes; e < vectors_end; e += kExcessBatch * step) {
    Few grads[kExcessBatch];
    Packed<Sum<T>> memories[kExcessBatch];
#pragma unroll
    for (int i = 0; i < kExcessBatch; ++i) {
      if (e + i * step >= vectors_end) continue;
      grads[i].raw = __ldg(reinterpret_cast<const typename Few::Raw*>(row.grad + e + i * step));
      memories[i] = load_packed(row.memory + e + i * step);
    }
#pragma unroll
    for (int i = 0; i < kExcessBatch; ++i) {
      if (e + i * step >= vectors_end) continue;
      S few = 0;  // meets the sum once, for one rounding of it instead of one for each lane
#pragma unroll
      for (int lane = 0; lane < Few::lanes; ++lane) few += row.term(grads[i].values[lane], memories[i].values[lane]);
      sum[0] += few;
    }
  }
#pragma unroll 1
  for (int64_t e = vectors_end + threadIdx.x; e < end; e += kExcessThreads) sum[0] += row.term(row.grad[e], row.memory[e]);
  block_sum<1>(sum, scratch, total);
}

/// One block per chunk of kDeviceChunk elements, whose sum goes to the tensor's sums at the chunk's number.
template <typename T>
__global__ void __launch_bounds__(kExcessThreads)
    excess_risk_chunks(const __grid_constant__ TensorTable table, double epsilon) {
  using S = Sum<T>;
  __shared__ double scratch[kExcessThreads / kWarpSize], total[1];
  const Chunk chunk = find_chunk(table, blockIdx.x);
  void* const* pointers = table.pointers(chunk.tensor);
  const T* grad = static_cast<const T*>(pointers[0]);
  const S* memory = static_cast<const S*>(pointers[1]);
  const double factor = *static_cast<const double*>(pointers[2]);
  bool wide = sizeof(S) == 4 && !(fits_float(factor) && fits_float(epsilon) && epsilon > 0);
  if (!wide) {
    const bool aligned = is_aligned(grad) && is_aligned(memory);
    const int64_t vectors_end =
        aligned ? chunk.begin + (chunk.end - chunk.begin) / Beside<T>::lanes * Beside<T>::lanes : chunk.begin;
    const ExcessRow<T, S> row{grad, memory, S(factor), S(epsilon)};
    excess_of_chunk(row, chunk.begin, vectors_end, chunk.end, reinterpret_cast<S*>(scratch), total);
    wide = sizeof(S) == 4 && out_of_range(total[0]);
    if (wide && total[0] == 0) wide = any_nonzero(row, chunk.begin, chunk.end);
  }
  if (wide) {
    const ExcessRow<T, double> row{grad, memory, factor, epsilon};
    excess_of_chunk(row, chunk.begin, chunk.begin, chunk.end, scratch, total);
  }
  if (threadIdx.x == 0) static_cast<double*>(pointers[3])[chunk.begin / kDeviceChunk] = total[0];
}

}  // namespace mtlkernels
