#pragma once
// What the backends of priority_combine share, and how its CUDA kernel cuts a layer. Plain C++ for host and device.

#include "numeric.h"

namespace mtlkernels {

/// alpha_i = sum over j != i of max(0, -D[i][j]) / D[i][i] for row i of D, 0 where D[i][i] is 0: how much of task i's gradient
/// the projections of the others off it add up to.
MTL_HOST_DEVICE inline double priority_alpha(const double* row, int task, int num_tasks) {
  double conflict = 0;
  for (int j = 0; j < num_tasks; ++j)
    if (j != task && row[j] < 0) conflict -= row[j];
  return row[task] > 0 ? conflict / row[task] : 0;
}

constexpr int kPriorityTasks = 64;  // at most
constexpr int kPriorityThreads = 256;
constexpr int kPriorityWarps = kPriorityThreads / 32;
constexpr int kPriorityRun = 8;  // short channels of a warp, at most

/// A layer cut into warps' shares of at most 512 elements (256 of float64): a slice of one channel, or a run of short ones.
struct PriorityShape {
  int64_t channels, rest;  // rest: elements of a channel
  int64_t slices;          // of a channel
  int32_t length;          // elements of a slice but the last
  int32_t run;             // channels of a warp

  MTL_HOST_DEVICE PriorityShape(int64_t channels, int64_t rest, int64_t element_bytes)
      : channels(channels), rest(rest), slices(1), length(0), run(1) {
    const int64_t most = element_bytes == 8 ? 256 : 512, granule = 32 / element_bytes;  // of whole sectors
    const int64_t equal = (rest + (rest + most - 1) / most - 1) / ((rest + most - 1) / most);
    length = int32_t((equal + granule - 1) / granule * granule);
    slices = (rest + length - 1) / length;
    if (slices == 1) run = int32_t(most / rest < 1 ? 1 : most / rest < kPriorityRun ? most / rest : kPriorityRun);
  }

  /// Blocks that go over the layer once.
  MTL_HOST_DEVICE int64_t blocks() const {
    const int64_t shares = slices > 1 ? channels * slices : (channels + run - 1) / run;
    return (shares + kPriorityWarps - 1) / kPriorityWarps;
  }
};

/// Dynamic shared memory of a block: the products of a block's channels, or the sums of all blocks.
MTL_HOST_DEVICE constexpr int priority_shared_bytes(int num_tasks) {
  const int products = kPriorityWarps * kPriorityRun * num_tasks, entries = num_tasks * num_tasks;
  const int most = entries > kPriorityThreads ? entries : kPriorityThreads;
  return 8 * (products > most ? products : most);
}

}  // namespace mtlkernels
