#pragma once
// Weighted sums of task gradients: out[e] = sum_k w_k g_k[e], each row read once, the result written once.
//
// The weights stay on the device. Sums are float32 (float64 for float64 gradients, and where a weight leaves float32's range)
// in the order of k, rounded to the gradients' dtype at the end. A row whose weight is exactly 0 is not read. The result may be
// one of the rows. Chunks are taken from the last to the first: a Gram of the same rows has usually been computed just before.

#include "../common/launch_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace mtlkernels {

constexpr int kCombineThreads = 256;
constexpr int32_t kCombineChannels = 32;  // of a block, where each channel has weights of its own

/// What a tensor's pointers mean: a gradient per task, the result, the task weights (float64); where each channel has its own,
/// [channels, num_rows] of them, also the elements of a channel as an integer.
struct CombineArguments {
  void* const* pointers;
  int num_rows;
  const double* weights;

  __device__ CombineArguments(const TensorTable& table, int tensor)
      : pointers(table.pointers(tensor)), num_rows(table.num_pointers - 2), weights(of_tensor()) {}
  __device__ CombineArguments(const TensorTable& table, int tensor, int64_t channel)
      : pointers(table.pointers(tensor)), num_rows(table.num_pointers - 3), weights(of_tensor() + channel * num_rows) {}
  __device__ CombineArguments(void* const* pointers, int num_rows)
      : pointers(pointers), num_rows(num_rows), weights(of_tensor()) {}
  __device__ const double* of_tensor() const { return static_cast<const double*>(pointers[num_rows + 1]); }
  __device__ int64_t channel_size() const { return reinterpret_cast<int64_t>(pointers[num_rows + 2]); }
  __device__ double weight(int k) const { return k < num_rows ? weights[k] : 0.0; }
  /// Row k; null where it is absent or has weight 0.
  template <typename T>
  __device__ const T* row(int k) const {
    return weight(k) != 0 ? static_cast<const T*>(pointers[k]) : nullptr;
  }
  template <typename T>
  __device__ T* result() const {
    return static_cast<T*>(pointers[num_rows]);
  }
};

/// K consecutive rows with their weights, in registers.
template <typename T, int K, typename S>
struct RowGroup {
  const T* rows[K];
  S weights[K];

  __device__ RowGroup(const CombineArguments& from, int first) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      rows[k] = from.row<T>(first + k);
      weights[k] = S(from.weight(first + k));
    }
  }

  /// `batch` vectors, from e on, `step` elements apart; those at `end` or past it are not read.
  template <int batch>
  __device__ void add_vectors(int64_t e, int64_t step, int64_t end, S (&sums)[batch][kLanes<T>]) const {
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
          if (rows[k]) sums[b][lane] += weights[k] * S(widen(packed[b][k].values[lane]));
  }

  __device__ void add_element(int64_t e, S& sum) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (rows[k]) sum += weights[k] * S(widen(rows[k][e]));
  }
};

/// Rows in groups of 4, taken up anew for every vector: for more rows than stay in registers.
template <typename T, typename S>
struct ManyRows {
  const CombineArguments& arguments;

  __device__ explicit ManyRows(const CombineArguments& from, int) : arguments(from) {}

  template <int batch>
  __device__ void add_vectors(int64_t e, int64_t step, int64_t end, S (&sums)[batch][kLanes<T>]) const {
#pragma unroll 1
    for (int k = 0; k < arguments.num_rows; k += 4) RowGroup<T, 4, S>(arguments, k).add_vectors(e, step, end, sums);
  }

  __device__ void add_element(int64_t e, S& sum) const {
#pragma unroll 1
    for (int k = 0; k < arguments.num_rows; k += 4) RowGroup<T, 4, S>(arguments, k).add_element(e, sum);
  }
};

/// Elements [begin, end) by `threads` threads, of which the caller is `thread`; a block's from the end, as the chunks.
template <typename T, typename S, typename Rows, int batch, int threads>
__device__ inline void combine_chunk(const CombineArguments& arguments, bool aligned, int thread, int64_t begin, int64_t end) {
  const Rows rows(arguments, 0);
  T* out = arguments.result<T>();
  constexpr int64_t step = threads * kLanes<T>, round = batch * step;
  const int64_t vectors_end = aligned ? begin + (end - begin) / kLanes<T> * kLanes<T> : begin;
  constexpr bool backwards = threads > kWarpSize;  // a channel has few elements, and registers are scarce there
  const int64_t last_round = backwards ? begin + (vectors_end - begin - 1) / round * round : begin;
  const auto in_range = [&](int64_t e) { return backwards ? vectors_end > begin && e >= begin : e < vectors_end; };
#pragma unroll 1
  for (int64_t e = last_round + thread * kLanes<T>; in_range(e); e += backwards ? -round : round) {
    S sums[batch][kLanes<T>] = {};
    rows.add_vectors(e, step, vectors_end, sums);
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      Packed<T> packed;
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) narrow(Sum<T>(sums[b][lane]), packed.values[lane]);
      if (e + b * step < vectors_end) store_packed(out + e + b * step, packed);
    }
  }
#pragma unroll 1
  for (int64_t e = vectors_end + thread; e < end; e += threads) {
    S sum = 0;
    rows.add_element(e, sum);
    narrow(Sum<T>(sum), out[e]);
  }
}

/// In float64, element by element: for weights that float32 cannot hold. Rare, so small rather than fast.
template <typename T, int threads>
__device__ void combine_wide(const CombineArguments& arguments, int thread, int64_t begin, int64_t end) {
#pragma unroll 1
  for (int64_t e = begin + thread; e < end; e += threads) {
    double sum = 0;
#pragma unroll 1
    for (int k = 0; k < arguments.num_rows; ++k) {
      const T* row = arguments.row<T>(k);
      if (row) sum += arguments.weight(k) * double(widen(row[e]));
    }
    narrow(Sum<T>(sum), arguments.result<T>()[e]);
  }
}

/// As combine_chunk, with what suits the weights and the addresses. K is the class of the number of rows: 1, 2, 3, 4, 8, or 64
/// for any number.
template <typename T, int K, int threads>
__device__ inline void combine_elements(const CombineArguments& arguments, int thread, int64_t begin, int64_t end) {
  bool aligned = is_aligned(arguments.result<T>() + begin), wide = false;
  for (int k = 0; k < arguments.num_rows; ++k) {
    const T* row = arguments.row<T>(k);
    const double size = fabs(arguments.weight(k));
    aligned &= !row || is_aligned(row + begin);
    wide |= row && !(size > 0x1p-100 && size < 0x1p100);
  }
  if (sizeof(Sum<T>) == 4 && wide) {
    combine_wide<T, threads>(arguments, thread, begin, end);
  } else if constexpr (K <= 8) {
    combine_chunk<T, Sum<T>, RowGroup<T, K, Sum<T>>, kBatch<K>, threads>(arguments, aligned, thread, begin, end);
  } else {
    combine_chunk<T, Sum<T>, ManyRows<T, Sum<T>>, 1, threads>(arguments, aligned, thread, begin, end);
  }
}

/// One block per chunk of kDeviceChunk elements.
template <typename T, int K>
__global__ void __launch_bounds__(kCombineThreads, 1) combine(const __grid_constant__ TensorTable table) {
  const Chunk chunk = find_chunk_from_end(table, blockIdx.x);
  combine_elements<T, K, kCombineThreads>(CombineArguments(table, chunk.tensor), threadIdx.x, chunk.begin, chunk.end);
}

/// Weights for each channel (row of a tensor viewed as [channels, rest]): a warp per channel, kCombineChannels of them a block.
/// The table counts channels as elements.
template <typename T, int K>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_channels(const __grid_constant__ TensorTable table) {
  const Chunk chunk = find_chunk_from_end(table, blockIdx.x, kCombineChannels);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int64_t channel = chunk.begin + warp; channel < chunk.end; channel += kCombineThreads / kWarpSize) {
    const CombineArguments arguments(table, chunk.tensor, channel);
    const int64_t begin = channel * arguments.channel_size();
    combine_elements<T, K, kWarpSize>(arguments, lane, begin, begin + arguments.channel_size());
  }
}

}  // namespace mtlkernels
