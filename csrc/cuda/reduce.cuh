#pragma once
// Sums across the threads of a block, in an order that never depends on scheduling, and when float32 cannot hold one.

namespace mtlkernels {

constexpr int kWarpSize = 32;

/// Sum over the 32 lanes of a warp; the result is valid in lane 0.
/// Contract: every lane of the warp calls it (no divergence around the call).
template <typename T>
__device__ inline T warp_sum(T value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

/// Sums each of `count` values over the lanes of a warp, in the order of warp_sum; count + 1 shuffles at most, as the lanes
/// share out the values. On return a lane holds the sums of `held` consecutive values from `first` on, in values[0 .. held).
/// Contract: every lane of the warp calls it, with first = 0 and held = count.
template <int count, typename T, int size, int offset = kWarpSize / 2>
__device__ inline void warp_sum_each(T (&values)[size], int& first, int& held) {
  constexpr int half = (count + 1) / 2;
  const bool upper = threadIdx.x & offset;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const T low = values[i], high = i + half < count ? values[i + half] : T(0);
    values[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, offset);
  }
  first += upper ? half : 0;
  held = upper ? (held > half ? held - half : 0) : (held < half ? held : half);
  if constexpr (offset > 1) warp_sum_each<half, T, size, offset / 2>(values, first, held);
}

/// Sums `count` values per thread over the block into `out[count]`, in float64 across warps.
/// Contract: all threads of the block call it; `scratch` holds count * warps values and `out` count, both in shared memory;
/// valid in every thread on return; two barriers. Order: lanes by halving, warps ascending, so equal inputs give equal bits.
template <int count, typename T>
__device__ inline void block_sum(const T (&values)[count], T* scratch, double* out) {
  const int warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const T sum = warp_sum(values[i]);
    if (threadIdx.x % kWarpSize == 0) scratch[warp * count + i] = sum;  // threads of a warp read neighbours below
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += double(scratch[w * count + i]);
    out[i] = sum;
  }
  __syncthreads();
}

/// Whether a float32 sum of squares, or of other terms of 0 or more, says nothing certain about its chunk: overflow, NaN, or so
/// small that terms underflowed.
__device__ inline bool out_of_range(double sum) { return !(sum < 0x1p127) || sum < 0x1p-96; }

/// Whether a row has an element that is not 0. Contract: all threads of the block call it; one barrier.
template <typename Row>
__device__ __forceinline__ bool any_nonzero(const Row& row, int64_t begin, int64_t end) {
  bool any = false;
#pragma unroll 1
  for (int64_t e = begin + threadIdx.x; e < end; e += blockDim.x) any |= row[e] != 0;
  return __syncthreads_or(any);
}

}  // namespace mtlkernels
