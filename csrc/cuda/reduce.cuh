#pragma once
// Sums across the threads of a block, in an order that never depends on scheduling.

namespace mtlkernels {

constexpr int kWarpSize = 32;

/// Sum over the 32 lanes of a warp; the result is valid in lane 0.
/// Contract: every lane of the warp calls it (no divergence around the call).
template <typename T>
__device__ inline T warp_sum(T value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
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
    if (threadIdx.x % kWarpSize == 0) scratch[i * warps + warp] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += double(scratch[i * warps + w]);
    out[i] = sum;
  }
  __syncthreads();
}

}  // namespace mtlkernels
