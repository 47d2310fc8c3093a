#pragma once
// What the backends of priority_combine share. Plain C++ for host and device.

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

}  // namespace mtlkernels
