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

  /// Vectors from e on; those of rows that count as zero are not read.
  __device__ void load(int64_t e, Packed<T> (&packed)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k)  // not through the read-only cache: may be the result
      if (rows[k]) packed[k].raw = *reinterpret_cast<const uint4*>(rows[k] + e);
  }

  __device__ void add(const Packed<T> (&packed)[K], Sides<Sum<T>> (&sides)[kLanes<T>]) const {
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane)
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (rows[k]) sides[lane].add(Sum<T>(widen(packed[k].values[lane])), leaks[k]);
  }

  __device__ void add_element(int64_t e, Sides<Sum<T>>& sides) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (rows[k]) sides.add(Sum<T>(widen(rows[k][e])), leaks[k]);
  }
};

/// The result's vector from e on.
template <typename T>
__device__ inline void store_drawn(const Sides<Sum<T>> (&sides)[kLanes<T>], uint64_t seed, uint32_t place, int64_t e, T* out) {
  float uniform[kLanes<T>];
  uniforms(seed, place, e, uniform);
  Packed<T> packed;
#pragma unroll
  for (int lane = 0; lane < kLanes<T>; ++lane) narrow(sides[lane].drawn(Sum<T>(uniform[lane])), packed.values[lane]);
  store_packed(out + e, packed);
}

template <typename T>
__device__ inline void store_drawn(const Sides<Sum<T>>& sides, uint64_t seed, uint32_t place, int64_t e, T* out) {
  const Philox words = element_words(seed, place, e / 4);
  const uint32_t low = e & 1 ? words.word[1] : words.word[0], high = e & 1 ? words.word[3] : words.word[2];
  narrow(sides.drawn(Sum<T>(uniform(e & 2 ? high : low))), out[e]);
}

/// One block per chunk of kDeviceChunk elements. K is the class of the number of rows: 1, 2, 3, 4, 8, or 64 for any number.
template <typename T, int K>
__global__ void __launch_bounds__(kDropThreads, K > 8)
    graddrop(const __grid_constant__ TensorTable table, const double* leaks, const bool* active, const int64_t* seeds) {
  constexpr int batch = K <= 8 ? kBatch<K> : 1, group = K <= 8 ? K : 4;
  constexpr int64_t step = kDropThreads * kLanes<T>;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  const DropArguments arguments{table.pointers(chunk.tensor), table.num_pointers - 2, leaks, active};
  const uint64_t seed = uint64_t(*seeds);
  const uint32_t place = arguments.place();
  T* out = arguments.result<T>();
  bool aligned = is_aligned(out);
  for (int k = 0; k < arguments.num_rows; ++k) aligned &= is_aligned(arguments.row<T>(k));
  const int64_t vectors_end = aligned ? chunk.begin + (chunk.end - chunk.begin) / kLanes<T> * kLanes<T> : chunk.begin;
  const DropRows<T, group> first(arguments, 0);
#pragma unroll 1
  for (int64_t e = chunk.begin + threadIdx.x * kLanes<T>; e < vectors_end; e += batch * step) {
    if constexpr (K <= 8) {
      Packed<T> packed[batch][group];
#pragma unroll
      for (int b = 0; b < batch; ++b)
        if (e + b * step < vectors_end) first.load(e + b * step, packed[b]);
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        if (e + b * step >= vectors_end) continue;
        Sides<Sum<T>> sides[kLanes<T>];
        first.add(packed[b], sides);
        store_drawn(sides, seed, place, e + b * step, out);
      }
    } else {
      Sides<Sum<T>> sides[kLanes<T>];
#pragma unroll 1
      for (int k = 0; k < arguments.num_rows; k += group) {
        const DropRows<T, group> rows(arguments, k);
        Packed<T> packed[group];
        rows.load(e, packed);
        rows.add(packed, sides);
      }
      store_drawn(sides, seed, place, e, out);
    }
  }
#pragma unroll 1
  for (int64_t e = vectors_end + threadIdx.x; e < chunk.end; e += kDropThreads) {
    Sides<Sum<T>> sides;
    if constexpr (K <= 8) {
      first.add_element(e, sides);
    } else {
#pragma unroll 1
      for (int k = 0; k < arguments.num_rows; k += group) DropRows<T, group>(arguments, k).add_element(e, sides);
    }
    store_drawn(sides, seed, place, e, out);
  }
}

}  // namespace mtlkernels
