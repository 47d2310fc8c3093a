#pragma once
// excess_risk, as far as it is the same on every device.

#include "columns.h"

namespace mtlkernels {

/// The gradients that are there, task by task, each with its memory: a column of two rows, as Columns takes them.
struct GradientMemories {
  int64_t num_tasks;
  TensorList rows;  // the gradients, then as many memories
  std::vector<int64_t> tasks;

  GradientMemories(const TensorList& grads, const std::vector<Tensor>& memory, const Tensor& factor) {
    require(factor.dim() == 1, "factor is not [K]");
    num_tasks = factor.size(0);
    require(memory.size() == grads.size() && (num_tasks > 0 ? int64_t(grads.size()) % num_tasks == 0 : grads.empty()),
            "grads and memory are not a row of equal length for each task");
    const int64_t num_tensors = num_tasks > 0 ? int64_t(grads.size()) / num_tasks : 0;
    for (int64_t i = 0; i < int64_t(grads.size()); ++i)
      if (grads[i]) tasks.push_back(i / num_tensors);
    rows.reserve(2 * tasks.size());
    for (const auto& grad : grads)
      if (grad) rows.push_back(grad);
    for (size_t i = 0; i < grads.size(); ++i)
      if (grads[i]) rows.push_back(memory[i]);
  }

  Columns columns() const { return Columns(rows, 2, false, nullptr, 0, false, 1); }
};

}  // namespace mtlkernels
