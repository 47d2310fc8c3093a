#pragma once
// Connection strengths of the channels of every layer, S[i][p] = |W_p|^2 scale[i][p]^2 / (variance[i][p] + eps) over its sum
// over p, and the task of the greatest: a block per layer.

#include <math_constants.h>

#include "../common/launch_plan.h"
#include "reduce.cuh"

namespace mtlkernels {

constexpr int kStrengthThreads = 256;

/// The table counts layers as elements, in chunks of 1. A layer's pointers: its channels' |W_p|^2 (float64), scale and variance
/// [K, C], the results S [K, C] and top tasks [C], and the numbers K and C. Tasks with equal scales and variances get equal
/// strengths, since all are summed in one order. Of equals the task with the lowest index is the top one; NaN never is.
template <typename T>
__global__ void __launch_bounds__(kStrengthThreads) connection_strength(const __grid_constant__ TensorTable table, double eps) {
  __shared__ double scratch[kStrengthThreads / kWarpSize], total[1];
  void* const* pointers = table.pointers(find_chunk(table, blockIdx.x, 1).tensor);
  const double* squares = static_cast<const double*>(pointers[0]);
  const T *scale = static_cast<const T*>(pointers[1]), *variance = static_cast<const T*>(pointers[2]);
  double* strength = static_cast<double*>(pointers[3]);
  int64_t* top = static_cast<int64_t*>(pointers[4]);
  const int64_t num_tasks = reinterpret_cast<int64_t>(pointers[5]), channels = reinterpret_cast<int64_t>(pointers[6]);
  for (int64_t i = 0; i < num_tasks; ++i) {
    double sum[1] = {0};
    double* row = strength + i * channels;
#pragma unroll 1
    for (int64_t p = threadIdx.x; p < channels; p += kStrengthThreads) {
      const double own = double(scale[i * channels + p]);
      sum[0] += row[p] = squares[p] * (own * own) / (double(variance[i * channels + p]) + eps);
    }
    block_sum<1>(sum, scratch, total);
#pragma unroll 1
    for (int64_t p = threadIdx.x; p < channels; p += kStrengthThreads) row[p] = total[0] == 0 ? 0.0 : row[p] / total[0];
  }
#pragma unroll 1
  for (int64_t p = threadIdx.x; p < channels; p += kStrengthThreads) {  // a thread's own channels, as above
    double best = -CUDART_INF;
    int64_t task = 0;
    for (int64_t i = 0; i < num_tasks; ++i) {
      if (!(strength[i * channels + p] > best)) continue;
      best = strength[i * channels + p];
      task = i;
    }
    top[p] = task;
  }
}

}  // namespace mtlkernels
