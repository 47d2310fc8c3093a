#pragma once
// Memories of task gradients and the update in one sweep: y_k <- keep_k y_k + scale_k g_k and out[e] = sum_k weight_k y_k[e];
// with `squares` y_k <- keep_k y_k + scale_k g_k^2 and out[e] = sum_k weight_k g_k[e]. Each row is read once, each memory and
// the result are written once; the factors stay on the device.
//
// Memories are float32 (float64 beside float64 gradients), and so is the arithmetic, in the order of k; where a factor leaves
// float32's range it is float64. What has a factor of exactly 0 is not read; a memory that does not move is not written. The
// result may be one of the gradients.

#include "../common/launch_plan.h"
#include "../common/memory_plan.h"
#include "vec.cuh"

namespace mtlkernels {

constexpr int kMemoryThreads = 256;
constexpr int kMemoryRows = 4;  // tasks whose loads are under way together

/// keep, scale and weight of every task, in fast memory.
template <typename S>
using MemoryFactors = S[3][kMemoryTasks];

/// One task over a tensor. Null: not read, or not written. T are gradients, M memories, S the arithmetic.
template <typename T, typename M, typename S>
struct TaskMemory {
  const T* grad;
  const M* before;
  M* after;
  S keep, scale, weight;
  bool squares;

  __device__ TaskMemory(void* const* pointers, int num_tasks, const MemoryFactors<S>& factors, bool squares, int k)
      : grad(nullptr), before(nullptr), after(nullptr), keep(1), scale(0), weight(0), squares(squares) {
    if (k >= num_tasks) return;
    keep = factors[0][k];
    scale = factors[1][k];
    weight = factors[2][k];
    M* memory = static_cast<M*>(pointers[num_tasks + k]);
    const bool moves = keep != 1 || scale != 0;
    if (scale != 0 || (squares && weight != 0)) grad = static_cast<const T*>(pointers[k]);
    if (keep != 0 && (moves || (!squares && weight != 0))) before = memory;
    if (moves) after = memory;
  }

  /// The memory's new value, and the task's part of the sum added.
  __device__ S moved(S value, S g, S& sum) const {
    S y = before ? keep * value : S(0);
    if (grad && scale != 0) y += scale * (squares ? g * g : g);
    if (weight != 0) sum += weight * (squares ? g : y);
    return y;
  }
};

/// Elements [begin, end) of a tensor, up to `vectors_end` in vectors.
template <typename T, typename S>
__device__ inline void memory_elements(void* const* pointers, int num_tasks, const MemoryFactors<S>& factors, bool squares,
                                       int64_t begin, int64_t vectors_end, int64_t end) {
  using M = Sum<T>;
  using Row = TaskMemory<T, M, S>;
  using Few = Beside<T>;
  T* out = static_cast<T*>(pointers[2 * num_tasks]);
#pragma unroll 1
  for (int64_t e = begin + threadIdx.x * Few::lanes; e < vectors_end; e += kMemoryThreads * Few::lanes) {
    S sums[Few::lanes] = {};
#pragma unroll 1
    for (int k = 0; k < num_tasks; k += kMemoryRows) {
      Few grads[kMemoryRows];  // not through the read-only cache: one may be the result
      Packed<M> memories[kMemoryRows];
#pragma unroll
      for (int r = 0; r < kMemoryRows; ++r) {
        const Row row(pointers, num_tasks, factors, squares, k + r);
        if (row.grad) grads[r].raw = *reinterpret_cast<const typename Few::Raw*>(row.grad + e);
        if (row.before) memories[r].raw = *reinterpret_cast<const uint4*>(row.before + e);
      }
#pragma unroll
      for (int r = 0; r < kMemoryRows; ++r) {
        const Row row(pointers, num_tasks, factors, squares, k + r);
#pragma unroll
        for (int lane = 0; lane < Few::lanes; ++lane) {
          M& value = memories[r].values[lane];
          value = M(row.moved(S(value), S(widen(grads[r].values[lane])), sums[lane]));
        }
        if (row.after) store_packed(row.after + e, memories[r]);
      }
    }
    Few result;
#pragma unroll
    for (int lane = 0; lane < Few::lanes; ++lane) narrow(M(sums[lane]), result.values[lane]);
    __stwb(reinterpret_cast<typename Few::Raw*>(out + e), result.raw);  // in one instruction, as store_packed
  }
#pragma unroll 1
  for (int64_t e = vectors_end + threadIdx.x; e < end; e += kMemoryThreads) {
    S sum = 0;
#pragma unroll 1
    for (int k = 0; k < num_tasks; ++k) {
      const Row row(pointers, num_tasks, factors, squares, k);
      const S g = row.grad ? S(widen(row.grad[e])) : S(0), value = row.before ? S(row.before[e]) : S(0);
      const S y = row.moved(value, g, sum);
      if (row.after) row.after[e] = M(y);
    }
    narrow(M(sum), out[e]);
  }
}

/// One block per chunk of kDeviceChunk elements. A tensor's pointers: a gradient for each task (null: counts as zero), a memory
/// for each, the result. `factors` [3, number of tasks].
template <typename T>
__global__ void __launch_bounds__(kMemoryThreads)
    memory_combine(const __grid_constant__ TensorTable table, const double* factors, bool squares) {
  using S = Sum<T>;
  __shared__ MemoryFactors<double> wide;
  __shared__ MemoryFactors<S> own;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  void* const* pointers = table.pointers(chunk.tensor);
  const int num_tasks = (table.num_pointers - 1) / 2;
  bool outside = false;
  for (int i = threadIdx.x; i < 3 * num_tasks; i += kMemoryThreads) {
    const double value = factors[i];
    wide[i / num_tasks][i % num_tasks] = value;
    own[i / num_tasks][i % num_tasks] = S(value);
    outside |= !fits_float(value);
  }
  outside = __syncthreads_or(outside);
  if (sizeof(S) == 4 && outside) {
    memory_elements<T, double>(pointers, num_tasks, wide, squares, chunk.begin, chunk.begin, chunk.end);
    return;
  }
  bool aligned = true;
  for (int i = 0; i < table.num_pointers; ++i) aligned &= is_aligned(static_cast<const char*>(pointers[i]));
  const int64_t vectors_end =
      aligned ? chunk.begin + (chunk.end - chunk.begin) / Beside<T>::lanes * Beside<T>::lanes : chunk.begin;
  memory_elements<T, S>(pointers, num_tasks, own, squares, chunk.begin, vectors_end, chunk.end);
}

}  // namespace mtlkernels
