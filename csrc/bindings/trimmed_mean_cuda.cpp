// trimmed_mean and trimmed_mean_ on CUDA. The active tasks stay on the device.

#include "elementwise_cuda.h"

namespace mtlkernels {
namespace {

void run(const TensorList& grads, int64_t num_tasks, int64_t trim, const std::optional<Tensor>& given,
         std::vector<Tensor>& out) {
  check_trim(trim, num_tasks);
  require(num_tasks <= kMaxTasks, "on CUDA, trimmed_mean takes at most 1024 tasks");
  require(trim <= kMostTrimmed, "on CUDA, trimmed_mean leaves out at most 32 gradients on each side");
  const Columns columns(grads, num_tasks, false, &out, 1);
  if (columns.size() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(columns.device_index());
  const std::optional<Tensor> tasks = checked_active(given, columns, num_tasks);
  const auto* active = tasks ? static_cast<const bool*>(tasks->const_data_ptr()) : nullptr;
  launch_flat(columns, grads, num_tasks, false, out, {},
              [&](DType dtype, const std::vector<PlannedTensor>& tensors, cuda::Stream stream) {
                return cuda::trimmed_mean(dtype, tensors, int(num_tasks), int(trim), active, stream);
              });
}

std::vector<Tensor> trimmed_mean_cuda(TensorList grads, int64_t num_tasks, int64_t trim, std::optional<Tensor> active) {
  return into_new(grads, num_tasks, [&](std::vector<Tensor>& out) { run(grads, num_tasks, trim, active, out); });
}

void trimmed_mean_inplace_cuda(std::vector<Tensor> out, TensorList grads, int64_t num_tasks, int64_t trim,
                               std::optional<Tensor> active) {
  into_buffers(out, grads, num_tasks, [&](std::vector<Tensor>& targets) { run(grads, num_tasks, trim, active, targets); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("trimmed_mean", TORCH_BOX(&trimmed_mean_cuda));
  m.impl("trimmed_mean_", TORCH_BOX(&trimmed_mean_inplace_cuda));
}

}  // namespace mtlkernels
