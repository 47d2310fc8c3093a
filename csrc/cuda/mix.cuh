#pragma once
// M weighted sums of K task gradients at once: out[m][e] = sum_k C[m][k] g_k[e], each row read once, each result written once.
//
// A thread keeps 16 bytes of every row in shared memory and sums four results at a time in registers. The coefficients stay on
// the device. Sums are float32 (float64 for float64 gradients, and where a coefficient leaves float32's range) in the order of
// k, rounded to the gradients' dtype at the end. A coefficient of exactly 0 leaves its row out; a row that has no other is not
// read.

#include <cuda_pipeline.h>

#include "../common/mix_plan.h"
#include "vec.cuh"

namespace mtlkernels {

/// What a block needs in shared memory, besides the staged rows.
template <typename T>
struct MixRows {
  const T* row[kMixRows];  // null where it is absent or has no coefficient
  T* result[kMixResults];
};

/// The results of `lanes` elements from e on: the 16 bytes of a vector, or one element.
template <typename T, int lanes>
__device__ inline void mix_elements(const MixRows<T>& tensor, int num_rows, int num_results, const Sum<T>* coefficients,
                                    uint4* staged, int64_t e) {
  uint4* own = staged + threadIdx.x;  // [num_rows], blockDim.x apart: no other thread reads it
  for (int k = 0; k < num_rows; ++k) {
    if (tensor.row[k] == nullptr) continue;
    if constexpr (lanes == kLanes<T>) {
      __pipeline_memcpy_async(own + k * blockDim.x, tensor.row[k] + e, 16);
    } else {
      *reinterpret_cast<T*>(own + k * blockDim.x) = tensor.row[k][e];
    }
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
#pragma unroll 1
  for (int first = 0; first < num_results; first += kMixGroup) {
    Sum<T> sums[kMixGroup][lanes] = {};
#pragma unroll 1
    for (int k = 0; k < num_rows; ++k) {
      if (tensor.row[k] == nullptr) continue;
      T values[lanes];
      if constexpr (lanes == kLanes<T>) {
        Packed<T> packed;
        packed.raw = own[k * blockDim.x];
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) values[lane] = packed.values[lane];
      } else {
        values[0] = *reinterpret_cast<const T*>(own + k * blockDim.x);
      }
      const Sum<T>* weight = coefficients + (first * num_rows + k * kMixGroup);
#pragma unroll
      for (int m = 0; m < kMixGroup; ++m) {
        if (weight[m] == 0) continue;
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) sums[m][lane] += weight[m] * widen(values[lane]);
      }
    }
#pragma unroll
    for (int m = 0; m < kMixGroup; ++m) {
      if (first + m >= num_results) break;
      if constexpr (lanes == kLanes<T>) {
        Packed<T> packed;
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) narrow(sums[m][lane], packed.values[lane]);
        store_packed(tensor.result[first + m] + e, packed);
      } else {
        narrow(sums[m][0], tensor.result[first + m][e]);
      }
    }
  }
}

/// In float64, element by element: for coefficients that float32 cannot hold. Rare, so small rather than fast.
template <typename T>
__device__ void mix_wide(const MixRows<T>& tensor, int num_rows, int num_results, const double* coefficients, int64_t begin,
                         int64_t end) {
#pragma unroll 1
  for (int64_t e = begin + threadIdx.x; e < end; e += blockDim.x) {
#pragma unroll 1
    for (int m = 0; m < num_results; ++m) {
      double sum = 0;
#pragma unroll 1
      for (int k = 0; k < num_rows; ++k) {
        const double weight = coefficients[m * num_rows + k];
        if (tensor.row[k] && weight != 0) sum += weight * double(widen(tensor.row[k][e]));
      }
      narrow(Sum<T>(sum), tensor.result[m][e]);
    }
  }
}

/// One block of mix_threads(num_rows) threads per chunk of kDeviceChunk elements. A tensor's pointers are its num_rows
/// gradients and its results; `coefficients` [results, num_rows].
template <typename T>
__global__ void __launch_bounds__(256)
    mix(const __grid_constant__ TensorTable table, int32_t num_rows, const double* coefficients) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ MixRows<T> tensor;
  uint4* staged = reinterpret_cast<uint4*>(memory);
  Sum<T>* grouped = reinterpret_cast<Sum<T>*>(staged + num_rows * blockDim.x);  // [group][row][kMixGroup]
  const Chunk chunk = find_chunk(table, blockIdx.x);
  void* const* pointers = table.pointers(chunk.tensor);
  const int num_results = table.num_pointers - num_rows;
  const int groups = (num_results + kMixGroup - 1) / kMixGroup;

  bool aligned = true, wide = false;
  for (int i = threadIdx.x; i < groups * kMixGroup * num_rows; i += blockDim.x) {
    const int m = i / kMixGroup / num_rows * kMixGroup + i % kMixGroup, k = i / kMixGroup % num_rows;
    const double weight = m < num_results ? coefficients[m * num_rows + k] : 0.0;
    wide |= !fits_float(weight);
    grouped[i] = Sum<T>(weight);
  }
  for (int k = threadIdx.x; k < num_rows; k += blockDim.x) {
    bool used = false;
    for (int m = 0; m < num_results; ++m) used |= coefficients[m * num_rows + k] != 0;
    tensor.row[k] = used ? static_cast<const T*>(pointers[k]) : nullptr;
    aligned &= is_aligned(tensor.row[k]);
  }
  for (int m = threadIdx.x; m < num_results; m += blockDim.x) {
    tensor.result[m] = static_cast<T*>(pointers[num_rows + m]);
    aligned &= is_aligned(tensor.result[m]);
  }
  aligned = __syncthreads_and(aligned);
  wide = __syncthreads_or(wide);

  if (sizeof(Sum<T>) == 4 && wide) {
    mix_wide<T>(tensor, num_rows, num_results, coefficients, chunk.begin, chunk.end);
    return;
  }
  const int64_t vectors = aligned ? (chunk.end - chunk.begin) / kLanes<T> : 0;
#pragma unroll 1
  for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x)
    mix_elements<T, kLanes<T>>(tensor, num_rows, num_results, grouped, staged, chunk.begin + v * kLanes<T>);
#pragma unroll 1
  for (int64_t e = chunk.begin + vectors * kLanes<T> + threadIdx.x; e < chunk.end; e += blockDim.x)
    mix_elements<T, 1>(tensor, num_rows, num_results, grouped, staged, e);
}

}  // namespace mtlkernels
