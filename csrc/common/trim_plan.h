#pragma once
// The most that the trimmed mean leaves out on each side on CUDA: what a thread keeps in registers of 4 bytes an element.

#include "numeric.h"

namespace mtlkernels {

constexpr int kMostTrimmed = 32;

/// Rows that a block has room for in shared memory: as many as its threads take at a time, or more.
MTL_HOST_DEVICE constexpr int trim_table(int num_rows) { return (num_rows + 15) / 16 * 16; }

}  // namespace mtlkernels
