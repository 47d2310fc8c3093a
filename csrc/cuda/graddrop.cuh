#pragma once
// GradDrop: an element's positive or its negative gradients, by a random number. Each row is read once, the result written
// once.
//
// In float32 (float64 for float64) in the order of the rows, compiled without fused multiply-adds, as every backend does it:
// all give the same bits. A row that is absent or whose task is not active is not read. The result may be one of the rows.

#include "../common/launch_plan.h"
#include "random.cuh"
#include "vec.cuh"

namespace mtlkernels {

constexpr int kDropThreads = 256;

/// What a tensor's pointers mean: a gradient per task, the result, the tensor's index in the list as an integer.
struct DropArguments {
  void* const* pointers;
  int num_rows;
  const double* leaks;  // [num_rows]
  const bool* active;   // [num_rows], null for all

  /// Row k; null where it counts as zero.
  template <typename T>
  __device__ const T* row(int k) const {
    return k < num_rows && (!active || active[k]) ? static_cast<const T*>(pointers[k]) : nullptr;
  }
  __device__ double leak(int k) const { return k < num_rows ? leaks[k] : 0.0; }
  template <typename T>
  __device__ T* result() const {
    return static_cast<T*>(pointers[num_rows]);
  }
  __device__ uint32_t place() const { return uint32_t(reinterpret_cast<uintptr_t>(pointers[num_rows + 1])); }
};

/// Sums of an element's gradients: of the positive and of the negative magnitudes, and the leaks of both.
template <typename S>
struct Sides {
  S up = 0, down = 0, leaked_up = 0, leaked_down = 0;

  /// Adds to the sums of the value's side; a NaN to both.
  __device__ void add(S value, S leak) {
    const S rise = value <= 0 ? S(0) : value, fall = value >= 0 ? S(0) : -value;
    up += rise;
    down += fall;
    leaked_up += leak * rise;
    leaked_down += leak * fall;
  }

  __device__ S drawn(S uniform) const {
    const S total = up + down;
    return (up > uniform * total ? up - leaked_down : leaked_up - down) + total * 0;
  }
};

/// K rows from `first` on, in registers.
template <typename T, int K>
struct DropRows {
  const T* rows[K];
  Sum<T> leaks[K];

  __device__ DropRows(const DropArguments& from, int first) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      rows[k] = from.row<T>(first + k);
      leaks[k] = Sum<T>(from.leak(first + k));
    }
  }

  /// `batch` vectors, from e on, `step` elements apart; those at `end` or past it are not read.
  template <int batch>
  __device__ void add_vectors(int64_t e, int64_t step, int64_t end, Sides<Sum<T>> (&sides)[batch][kLanes<T>]) const {
    Packed<T> packed[batch][K];
#pragma unroll
    for (int b = 0; b < batch; ++b)
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (rows[k] && e + b * step < end)  // not through the read-only cache: may be the result
          packed[b][k].raw = *reinterpret_cast<const uint4*>(rows[k] + e + b * step);
#pragma unroll
    for (int b = 0; b < batch; ++b)
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane)
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (rows[k]) sides[b][lane].add(Sum<T>(widen(packed[b][k].values[lane])), leaks[k]);
  }

  __device__ void add_element(int64_t e, Sides<Sum<T>>& sides) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (rows[k]) sides.add(Sum<T>(widen(rows[k][e])), leaks[k]);
  }
};

/// All rows in groups of K, taken up anew for every vector where there are more.
template <typename T, int K>
struct DropGroups {
  const DropArguments& arguments;

  template <int batch>
  __device__ void add_vectors(int64_t e, int64_t step, int64_t end, Sides<Sum<T>> (&sides)[batch][kLanes<T>]) const {
#pragma unroll 1
    for (int k = 0; k < arguments.num_rows; k += K) DropRows<T, K>(arguments, k).add_vectors(e, step, end, sides);
  }
  __device__ void add_element(int64_t e, Sides<Sum<T>>& sides) const {
#pragma unroll 1
    for (int k = 0; k < arguments.num_rows; k += K) DropRows<T, K>(arguments, k).add_element(e, sides);
  }
};

/// Elements of a chunk, of the rows of `Rows`.
template <typename T, int batch, typename Rows>
__device__ inline void drop_chunk(const Rows& rows, const DropArguments& arguments, uint64_t seed, const Chunk& chunk) {
  using S = Sum<T>;
  constexpr int64_t step = kDropThreads * kLanes<T>;
  T* out = arguments.result<T>();
  const uint32_t place = arguments.place();
  bool aligned = is_aligned(out);
  for (int k = 0; k < arguments.num_rows; ++k) {
    const T* row = arguments.row<T>(k);
    aligned &= !row || is_aligned(row);
  }
  const int64_t vectors_end = aligned ? chunk.begin + (chunk.end - chunk.begin) / kLanes<T> * kLanes<T> : chunk.begin;
#pragma unroll 1
  for (int64_t e = chunk.begin + threadIdx.x * kLanes<T>; e < vectors_end; e += batch * step) {
    Sides<S> sides[batch][kLanes<T>];
    rows.add_vectors(e, step, vectors_end, sides);
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      float uniform[kLanes<T>];
      uniforms(seed, place, e + b * step, uniform);
      Packed<T> packed;
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) narrow(sides[b][lane].drawn(S(uniform[lane])), packed.values[lane]);
      if (e + b * step < vectors_end) store_packed(out + e + b * step, packed);
    }
  }
#pragma unroll 1
  for (int64_t e = vectors_end + threadIdx.x; e < chunk.end; e += kDropThreads) {
    Sides<S> sides;
    rows.add_element(e, sides);
    const Philox words = element_words(seed, place, e / 4);
    const uint32_t low = e & 1 ? words.word[1] : words.word[0], high = e & 1 ? words.word[3] : words.word[2];
    narrow(sides.drawn(S(uniform(e & 2 ? high : low))), out[e]);
  }
}

/// One block per chunk of kDeviceChunk elements. K is the class of the number of rows: 1, 2, 3, 4, 8, or 64 for any number.
template <typename T, int K>
__global__ void __launch_bounds__(kDropThreads)
    graddrop(const __grid_constant__ TensorTable table, const double* leaks, const bool* active, const int64_t* seed) {
  const Chunk chunk = find_chunk(table, blockIdx.x);
  const DropArguments arguments{table.pointers(chunk.tensor), table.num_pointers - 2, leaks, active};
  if constexpr (K <= 8) {
    drop_chunk<T, kBatch<K>>(DropRows<T, K>(arguments, 0), arguments, uint64_t(*seed), chunk);
  } else {
    drop_chunk<T, 1>(DropGroups<T, 4>{arguments}, arguments, uint64_t(*seed), chunk);
  }
}

}  // namespace mtlkernels
