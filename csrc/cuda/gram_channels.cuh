#pragma once
// One Gram matrix per channel (row of a tensor viewed as [channels, rest]): a warp per channel.
//
// Up to eight tasks, each element is read once. More go in groups of rows, one against another, and come again from the cache
// for every other group. Products and sums are float32 (float64 for float64 gradients); a channel whose squares leave
// float32's range is summed again in float64.

#include "gram.cuh"

namespace mtlkernels {

constexpr int kChannelWarps = 4;
constexpr int32_t kChannelsOfBlock = 32;

/// What a tensor's pointers mean: a gradient per task, the results [channels][num_left][num_right], and the elements of a
/// channel as an integer. The table counts channels as elements, in chunks of kChannelsOfBlock.
struct ChannelArguments {
  void* const* pointers;
  int num_rows, num_other;  // all rows; how many at the end are the columns of the result, 0 for a square one

  __device__ ChannelArguments(const TensorTable& table, int tensor, int other)
      : pointers(table.pointers(tensor)), num_rows(table.num_pointers - 2), num_other(other) {}
  __device__ int64_t rest() const { return reinterpret_cast<int64_t>(pointers[num_rows + 1]); }
  template <typename T>
  __device__ const T* row(int k, int64_t channel) const {
    return k < num_rows && pointers[k] ? static_cast<const T*>(pointers[k]) + channel * rest() : nullptr;
  }
  /// Stores <row i, row j>, i <= j, where the result has it.
  __device__ void store(int64_t channel, int i, int j, double value) const {
    const int left = num_rows - num_other, right = num_other ? num_other : num_rows;
    double* matrix = static_cast<double*>(pointers[num_rows]) + channel * left * right;
    if (j >= num_rows) return;
    if (num_other == 0) {
      matrix[i * right + j] = matrix[j * right + i] = value;
    } else if (i < left && j >= left) {
      matrix[i * right + j - left] = value;
    }
  }
};

/// Whether a warp's row has an element that is not 0. Contract: every lane calls it.
template <typename T>
__device__ inline bool any_nonzero_in_channel(const T* row, int64_t rest) {
  bool any = false;
#pragma unroll 1
  for (int64_t e = threadIdx.x % kWarpSize; e < rest; e += kWarpSize) any |= widen(row[e]) != 0;
  return __any_sync(0xffffffffu, any);
}

/// A channel in float64, of which float32 sums said nothing certain for the rows in `suspects`; rare, so small rather than
/// fast. Contract: every lane calls it, with the same arguments.
template <typename T>
__device__ inline void mend_channel(const ChannelArguments& arguments, int64_t channel, uint64_t suspects) {
  const int64_t rest = arguments.rest();
  const int lane = threadIdx.x % kWarpSize;
  bool again = false;
#pragma unroll 1
  for (int k = 0; k < arguments.num_rows && !again; ++k)
    again = (suspects >> k & 1) && any_nonzero_in_channel(arguments.row<T>(k, channel), rest);
  if (!again) return;
#pragma unroll 1
  for (int i = 0; i < arguments.num_rows; ++i) {
#pragma unroll 1
    for (int j = i; j < arguments.num_rows; ++j) {
      const T *a = arguments.row<T>(i, channel), *b = arguments.row<T>(j, channel);
      double sum = 0;
#pragma unroll 1
      for (int64_t e = lane; a && b && e < rest; e += kWarpSize) sum += double(widen(a[e])) * double(widen(b[e]));
      sum = warp_sum(sum);
      if (lane == 0) arguments.store(channel, i, j, sum);
    }
  }
}

/// A group of K consecutive rows of a channel.
template <typename T, int K>
struct ChannelRows {
  const T* rows[K];
  bool aligned = true;

  __device__ ChannelRows(const ChannelArguments& arguments, int first, int64_t channel) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      rows[k] = arguments.row<T>(first + k, channel);
      aligned &= is_aligned(rows[k]);
    }
  }
  /// Vectors at e, where that is before `end`.
  __device__ void load(int64_t e, int64_t end, Packed<T> (&packed)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (rows[k] && e < end) packed[k] = load_packed(rows[k] + e);
  }
  __device__ void load(int64_t e, Sum<T> (&value)[K][1]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) value[k][0] = rows[k] ? widen(rows[k][e]) : Sum<T>(0);
  }
};

/// Elements of a channel that are summed in float32 before float64 takes over: 16 vectors a lane.
template <typename T>
constexpr int64_t kSegment = 16 * kWarpSize * kLanes<T>;

/// Pairs within the K rows from `first` on. Returns those of them whose squares are out of range, as a lane sees them.
template <typename T, int K>
__device__ inline uint64_t pairs_within(const ChannelArguments& arguments, int first, int64_t channel) {
  constexpr int pairs = num_pairs(K), most = (pairs + kWarpSize - 1) / kWarpSize;
  constexpr int64_t step = kWarpSize * kLanes<T>;
  const ChannelRows<T, K> group(arguments, first, channel);
  const int64_t rest = arguments.rest(), vectors_end = group.aligned ? rest / kLanes<T> * kLanes<T> : 0;
  const int lane = threadIdx.x % kWarpSize;
  double totals[most] = {};
  int begin = 0, held = pairs;
#pragma unroll 1
  for (int64_t segment = 0; segment < rest; segment += kSegment<T>) {
    const int64_t end = segment + kSegment<T> < rest ? segment + kSegment<T> : rest;
    const int64_t packed_end = end < vectors_end ? end : vectors_end;
    Sum<T> sums[pairs] = {};
#pragma unroll 1
    for (int64_t e = segment + lane * kLanes<T>; e < packed_end; e += kBatch<K> * step) {
      Packed<T> packed[kBatch<K>][K];
#pragma unroll
      for (int b = 0; b < kBatch<K>; ++b) group.load(e + b * step, packed_end, packed[b]);
#pragma unroll
      for (int b = 0; b < kBatch<K>; ++b) add_products<T, K>(GradientRows(), packed[b], sums);
    }
#pragma unroll 1
    for (int64_t e = (segment > vectors_end ? segment : vectors_end) + lane; e < end; e += kWarpSize) {
      Sum<T> value[K][1];
      group.load(e, value);
      add_products<Sum<T>, K, 1>(value, sums);
    }
    begin = 0;
    held = pairs;
    warp_sum_each<pairs>(sums, begin, held);
#pragma unroll
    for (int s = 0; s < most; ++s) totals[s] += double(sums[s]);
  }
  uint64_t suspects = 0;
#pragma unroll
  for (int s = 0; s < most; ++s) {
    if (s >= held) break;
    int i = 0, j = begin + s;
    while (j >= K - i) j -= K - i++;
    j += i;
    arguments.store(channel, first + i, first + j, totals[s]);
    if (i == j && arguments.row<T>(first + i, channel) && out_of_range(totals[s])) suspects |= uint64_t(1) << (first + i);
  }
  return suspects;
}

/// Pairs of the K rows from `first` on with the K from `second` on.
template <typename T, int K>
__device__ inline void pairs_between(const ChannelArguments& arguments, int first, int second, int64_t channel) {
  constexpr int pairs = K * K, most = (pairs + kWarpSize - 1) / kWarpSize;
  const ChannelRows<T, K> left(arguments, first, channel), right(arguments, second, channel);
  const int64_t rest = arguments.rest(), step = kSegment<T> / kLanes<T>;
  const int lane = threadIdx.x % kWarpSize;
  double totals[most] = {};
  int begin = 0, held = pairs;
#pragma unroll 1
  for (int64_t segment = 0; segment < rest; segment += step) {
    Sum<T> sums[pairs] = {};
#pragma unroll 1
    for (int64_t e = segment + lane; e < (segment + step < rest ? segment + step : rest); e += kWarpSize) {
      Sum<T> a[K][1], b[K][1];
      left.load(e, a);
      right.load(e, b);
#pragma unroll
      for (int i = 0; i < K; ++i)
#pragma unroll
        for (int j = 0; j < K; ++j) sums[i * K + j] += a[i][0] * b[j][0];
    }
    begin = 0;
    held = pairs;
    warp_sum_each<pairs>(sums, begin, held);
#pragma unroll
    for (int s = 0; s < most; ++s) totals[s] += double(sums[s]);
  }
#pragma unroll
  for (int s = 0; s < most; ++s)
    if (s < held) arguments.store(channel, first + (begin + s) / K, second + (begin + s) % K, totals[s]);
}

/// Blocks of a multiprocessor, so that enough bytes are under way.
template <int K>
constexpr int kChannelBlocks = K == 2   ? 8
                               : K == 4 ? 6
                               : K == 8 ? 3
                                        : 1;

/// K = 2, 4 or 8 at least as many as rows, or 64 for any number of rows.
template <typename T, int K>
__global__ void __launch_bounds__(kChannelWarps* kWarpSize, kChannelBlocks<K>)
    gram_channels(const __grid_constant__ TensorTable table, int32_t num_other) {
  constexpr int group = K <= 8 ? K : sizeof(T) == 8 ? 4 : 8;
  const Chunk chunk = find_chunk(table, blockIdx.x, kChannelsOfBlock);
  const ChannelArguments arguments(table, chunk.tensor, num_other);
#pragma unroll 1
  for (int64_t channel = chunk.begin + threadIdx.x / kWarpSize; channel < chunk.end; channel += kChannelWarps) {
    uint64_t suspects = 0;
#pragma unroll 1
    for (int first = 0; first < (K <= 8 ? 1 : arguments.num_rows); first += group) {
      suspects |= pairs_within<T, group>(arguments, first, channel);
#pragma unroll 1
      for (int second = first + group; K > 8 && second < arguments.num_rows; second += group)
        pairs_between<T, group>(arguments, first, second, channel);
    }
    if constexpr (sizeof(Sum<T>) == 4) {
      const uint32_t low = __reduce_or_sync(0xffffffffu, uint32_t(suspects));
      const uint32_t high = __reduce_or_sync(0xffffffffu, uint32_t(suspects >> 32));
      __syncwarp();  // the sums are stored before others take their place
      if (low | high) mend_channel<T>(arguments, channel, uint64_t(high) << 32 | low);
    }
  }
}

}  // namespace mtlkernels
