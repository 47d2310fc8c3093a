#pragma once
// The ops that have one result of each tensor's rows, element by element, on CUDA: a launch per dtype, on the current stream of
// the tensors' device.

#include "cuda_call.h"
#include "elementwise.h"

namespace mtlkernels {

/// launch(dtype, tensors, stream) for each dtype; a tensor's pointers are its gradients, its result, and where there are
/// `words` its own as an integer. Columns that are not flat are copied first, and their results last. `logical` as of Columns.
template <typename Launch>
void launch_flat(const Columns& given, const TensorList& grads, int64_t num_tasks, bool logical, std::vector<Tensor>& out,
                 const std::vector<int64_t>& words, const Launch& launch) {
  const TensorList flat = flat_gradients(given, grads);
  std::vector<Tensor> targets = out;
  std::vector<int64_t> aside;
  for (int64_t n = 0; n < given.size(); ++n) {
    if (given[n].layout.dim == 0) continue;
    targets[n] = torch::stable::new_empty(out[n], out[n].sizes());
    aside.push_back(n);
  }
  const Columns columns(flat, num_tasks, logical, &targets, 1, logical);
  const int64_t num_pointers = num_tasks + (words.empty() ? 1 : 2);
  std::vector<void*> pointers(columns.size() * num_pointers);
  for (DType dtype : kDTypes) {
    std::vector<PlannedTensor> tensors;
    for (int64_t n = 0; n < columns.size(); ++n) {
      if (columns[n].dtype != dtype || columns[n].layout.numel == 0) continue;
      void** own = pointers.data() + n * num_pointers;
      for (int64_t k = 0; k < num_tasks; ++k) own[k] = const_cast<void*>(columns[n].rows[k]);
      own[num_tasks] = columns.output(n).rows[0];
      if (!words.empty()) own[num_tasks + 1] = reinterpret_cast<void*>(words[n]);
      tensors.push_back({own, columns[n].layout.numel});
    }
    if (tensors.empty()) continue;
    const char* error = launch(dtype, tensors, current_stream(given.device_index()));
    require(!error, error);
  }
  for (int64_t n : aside) torch::stable::copy_(out[n], targets[n]);
}

}  // namespace mtlkernels
