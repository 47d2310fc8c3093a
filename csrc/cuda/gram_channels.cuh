#pragma once
// One Gram matrix per channel (row of a tensor viewed as [channels, rest]): a warp per channel, 4 rows against 4 at a time.
//
// With up to 4 tasks each element is read once; with more, a channel's rows come again, from the cache, for every pair of
// groups. Products and sums are float64: channels are many and short, and any range of magnitudes is right without a second
// look.

#include "gram.cuh"

namespace mtlkernels {

constexpr int kChannelWarps = 8;
constexpr int32_t kChannelsOfBlock = 32;

/// What a tensor's pointers mean: a gradient per task, the results [channels][num_rows][num_rows], and the elements of a
/// channel as an integer. The table counts channels as elements, in chunks of kChannelsOfBlock.
struct ChannelArguments {
  void* const* pointers;
  int num_rows;

  __device__ ChannelArguments(const TensorTable& table, int tensor)
      : pointers(table.pointers(tensor)), num_rows(table.num_pointers - 2) {}
  __device__ int64_t rest() const { return reinterpret_cast<int64_t>(pointers[num_rows + 1]); }
  __device__ double* matrix(int64_t channel) const {
    return static_cast<double*>(pointers[num_rows]) + channel * num_rows * num_rows;
  }
  template <typename T>
  __device__ const T* row(int k, int64_t channel) const {
    return k < num_rows && pointers[k] ? static_cast<const T*>(pointers[k]) + channel * rest() : nullptr;
  }
};

/// sums[i][j] += a_i b_j over a channel, lanes `kWarpSize` apart.
template <typename T, int K>
__device__ inline void channel_products(const T* const (&a)[K], const T* const (&b)[K], int64_t rest, double (&sums)[K][K]) {
#pragma unroll 1
  for (int64_t e = threadIdx.x % kWarpSize; e < rest; e += kWarpSize) {
    double left[K], right[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      left[k] = a[k] ? double(widen(a[k][e])) : 0.0;
      right[k] = b[k] == a[k] ? left[k] : b[k] ? double(widen(b[k][e])) : 0.0;
    }
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int j = 0; j < K; ++j) sums[i][j] += left[i] * right[j];
  }
}

/// K = 2 or 4 rows at a time; any number of rows.
template <typename T, int K>
__global__ void __launch_bounds__(kChannelWarps* kWarpSize) gram_channels(const __grid_constant__ TensorTable table) {
  const Chunk chunk = find_chunk(table, blockIdx.x, kChannelsOfBlock);
  const ChannelArguments arguments(table, chunk.tensor);
  for (int64_t channel = chunk.begin + threadIdx.x / kWarpSize; channel < chunk.end; channel += kChannelWarps) {
    double* matrix = arguments.matrix(channel);
    for (int first = 0; first < arguments.num_rows; first += K) {
      for (int second = first; second < arguments.num_rows; second += K) {
        const T *a[K], *b[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          a[k] = arguments.row<T>(first + k, channel);
          b[k] = arguments.row<T>(second + k, channel);
        }
        double sums[K][K] = {};
        channel_products<T, K>(a, b, arguments.rest(), sums);
#pragma unroll
        for (int i = 0; i < K; ++i) {
#pragma unroll
          for (int j = 0; j < K; ++j) {
            const double sum = warp_sum(sums[i][j]);
            const int row = first + i, column = second + j;
            if (threadIdx.x % kWarpSize == 0 && row <= column && column < arguments.num_rows)
              matrix[row * arguments.num_rows + column] = matrix[column * arguments.num_rows + row] = sum;
          }
        }
      }
    }
  }
}

}  // namespace mtlkernels
