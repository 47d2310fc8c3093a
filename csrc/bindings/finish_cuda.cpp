// combine_sgd_ and combine_adam_ on CUDA: a launch per dtype, on the current stream of the tensors' device.

#include "cuda_call.h"
#include "finish.h"

namespace mtlkernels {
namespace {

/// Launches `launch(dtype, tensors, lr, skip, stream)` on tensors with `num_states` states each, null where they have fewer.
template <typename Launch>
void run(const Finish& finish, const std::vector<Tensor>& steps, int64_t num_states, const Launch& launch) {
  const int64_t num_tasks = finish.num_tasks, num_moved = finish.num_moved;
  require(num_tasks <= kMaxTasks, "on CUDA, a finish takes at most 1024 tasks");
  const Columns given(finish.grads, num_tasks, false, &finish.moved, num_moved);
  const int64_t num_columns = given.size();
  require(given.same_device(finish.weights), "weights is not on the gradients' device");
  require(given.same_device(finish.lr), "lr is not on the gradients' device");
  require(!finish.skip || given.same_device(*finish.skip), "skip is not on the gradients' device");
  for (const Tensor& step : steps) require(given.same_device(step), "a step is not on the gradients' device");
  const torch::stable::accelerator::DeviceGuard guard(given.device_index());
  const Tensor table = as_float64(finish.weights, "weights is not float32 or float64");
  const double* weights = static_cast<const double*>(table.const_data_ptr());
  const TensorList flat = flat_gradients(given, finish.grads);
  std::vector<Tensor> targets = finish.moved;
  std::vector<size_t> aside;  // of columns that are not flat, copied to their places at the end
  for (size_t i = 0; i < targets.size(); ++i) {
    if (given[int64_t(i) % num_columns].layout.dim == 0) continue;
    targets[i] = torch::stable::contiguous(targets[i]);
    aside.push_back(i);
  }
  const Columns columns(flat, num_tasks, false, &targets, num_moved);
  const int64_t most = num_tasks + num_states + 3;  // pointers of a tensor: parameter, weights, step besides
  std::vector<void*> pointers(num_columns * most, nullptr);
  for (DType dtype : kDTypes) {
    std::vector<PlannedTensor> tensors;
    for (int64_t n = 0; n < num_columns; ++n) {
      if (columns[n].dtype != dtype || columns[n].layout.numel == 0) continue;
      void** own = pointers.data() + n * most;
      for (int64_t k = 0; k < num_tasks; ++k) own[k] = const_cast<void*>(columns[n].rows[k]);
      own[num_tasks] = columns.output(n).rows[0];
      own[num_tasks + 1] = const_cast<double*>(weights + finish.weight_row(n) * num_tasks);
      for (int64_t m = 1; m < num_moved; ++m) own[num_tasks + 1 + m] = columns.output(n).rows[m];
      if (!steps.empty()) own[most - 1] = const_cast<void*>(steps[n].const_data_ptr());
      tensors.push_back({own, columns[n].layout.numel});
    }
    if (tensors.empty()) continue;
    const char* error = launch(dtype, tensors, static_cast<const double*>(finish.lr.const_data_ptr()),
                               finish.skip ? static_cast<const bool*>(finish.skip->const_data_ptr()) : nullptr,
                               current_stream(given.device_index()));
    require(!error, error);
  }
  for (size_t i : aside) {
    Tensor place = finish.moved[i];
    torch::stable::copy_(place, targets[i]);
  }
}

void run_sgd(const Finish& finish, const SgdOptions& options) {
  run(finish, {}, 1, [&](DType dtype, const auto& tensors, const double* lr, const bool* skip, cuda::Stream stream) {
    return cuda::combine_sgd(dtype, tensors, int(finish.num_tasks), lr, skip, options, stream);
  });
}

void run_adam(const Finish& finish, const std::vector<Tensor>& steps, const AdamOptions& options) {
  run(finish, steps, 3, [&](DType dtype, const auto& tensors, const double* lr, const bool* skip, cuda::Stream stream) {
    return cuda::combine_adam(dtype, tensors, int(finish.num_tasks), lr, skip, options, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("combine_sgd_", TORCH_BOX(&combine_sgd_op<run_sgd>));
  m.impl("combine_adam_", TORCH_BOX(&combine_adam_op<run_adam>));
}

}  // namespace mtlkernels
