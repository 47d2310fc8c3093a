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
/// Travels as kPriorityShapeWords words among a layer's pointers, so that no block has to divide for it.
struct PriorityShape {
  int64_t channels, rest;  // rest: elements of a channel
  int64_t slices;          // of a channel
  int64_t blocks;          // that go over the layer once
  int32_t length;          // elements of a slice but the last
  int32_t run;             // channels of a warp
};
constexpr int kPriorityShapeWords = sizeof(PriorityShape) / 8;

inline PriorityShape priority_shape(int64_t channels, int64_t rest, int64_t element_bytes) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t most = element_bytes == 8 ? 256 : 512, granule = 32 / element_bytes;  // of whole sectors
  PriorityShape shape{channels, rest, 1, 0, 0, 1};
  shape.length = int32_t(divide_up(divide_up(rest, divide_up(rest, most)), granule) * granule);
  shape.slices = divide_up(rest, shape.length);
  if (shape.slices == 1) shape.run = int32_t(most / rest < kPriorityRun ? most / rest : kPriorityRun);
  if (shape.run < 1) shape.run = 1;
  shape.blocks = divide_up(shape.slices > 1 ? channels * shape.slices : divide_up(channels, shape.run), kPriorityWarps);
  return shape;
}

/// Dynamic shared memory of a block: the products of a block's channels, or the sums of all blocks.
MTL_HOST_DEVICE constexpr int priority_shared_bytes(int num_tasks) {
  const int products = kPriorityWarps * kPriorityRun * num_tasks, entries = num_tasks * (num_tasks + 1);
  const int most = entries > 2 * kPriorityThreads ? entries : 2 * kPriorityThreads;
  return 8 * (products > most ? products : most);
}

}  // namespace mtlkernels
