#pragma once
// memory_combine_, as far as it is the same on every device.

#include "combine.h"

namespace mtlkernels {

/// A device's part: rows are `num_tasks` gradients of every tensor and then as many memories, which are written, as Kernels
/// says. `factors` [3, num_tasks]. An output may be one of its own gradients.
using RunMemoryCombine = void (*)(const TensorList& rows, int64_t num_tasks, const Tensor& factors, bool squares,
                                  std::vector<Tensor>& out);

/// Results whose buffers share memory with what is still to be read are kept aside.
inline void memory_combine_into(const std::vector<Tensor>& out, const std::vector<Tensor>& memory, const TensorList& grads,
                                const Tensor& factors, bool squares, RunMemoryCombine run) {
  require(factors.dim() == 2 && factors.size(0) == 3, "factors is not [3, K]");
  const int64_t num_tasks = factors.size(1);
  require(grads.size() == size_t(num_tasks) * out.size() && memory.size() == grads.size(),
          "grads and memory are not a row of the results' length for each task");
  if (out.empty()) return;
  TensorList rows = grads;
  rows.insert(rows.end(), memory.begin(), memory.end());
  std::vector<Tensor> targets = out;
  const std::vector<int64_t> aside = entangled(out, rows, 2 * num_tasks);
  for (int64_t n : aside) targets[n] = torch::stable::empty_like(out[n]);
  run(rows, num_tasks, factors, squares, targets);
  for (int64_t n : aside) {
    Tensor target = out[n];
    torch::stable::copy_(target, targets[n]);
  }
}

}  // namespace mtlkernels
