#pragma once
// How the mix kernel is launched. Plain C++ for host and device.

#include "launch_plan.h"
#include "numeric.h"

namespace mtlkernels {

constexpr int kMixRows = 64;     // at most
constexpr int kMixResults = 64;  // at most, of one launch
constexpr int kMixGroup = 4;     // results that a thread sums at a time

/// Threads of a block: as many as have room for 16 bytes of every row in the 99 KiB of shared memory of every chip.
MTL_HOST_DEVICE constexpr int mix_threads(int num_rows) { return num_rows <= 16 ? 256 : 64; }

/// Dynamic shared memory of a block: 16 bytes of every row and thread, then the coefficients, in groups of kMixGroup results.
MTL_HOST_DEVICE constexpr int mix_shared_bytes(DType dtype, int num_rows, int num_results) {
  const int groups = (num_results + kMixGroup - 1) / kMixGroup, bytes = dtype == DType::float64 ? 8 : 4;
  return num_rows * (mix_threads(num_rows) * 16 + groups * kMixGroup * bytes);
}

}  // namespace mtlkernels
