// graddrop and graddrop_ on CUDA. The leak, the active tasks and the seed stay on the device.

#include "elementwise_cuda.h"

namespace mtlkernels {
namespace {

void run(const TensorList& grads, const Draw& given, std::vector<Tensor>& out) {
  const int64_t num_tasks = given.num_tasks();
  require(num_tasks <= kMaxTasks, "on CUDA, graddrop takes at most 1024 tasks");
  const Columns columns(grads, num_tasks, true, &out, 1, true);
  if (columns.size() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(columns.device_index());
  const Draw draw = checked(given, columns);
  const auto* leak = static_cast<const double*>(draw.leak.const_data_ptr());
  const auto* active = draw.active ? static_cast<const bool*>(draw.active->const_data_ptr()) : nullptr;
  const auto* seed = static_cast<const int64_t*>(draw.seed.const_data_ptr());
  launch_flat(columns, grads, num_tasks, true, out, draw.places,
              [&](DType dtype, const std::vector<PlannedTensor>& tensors, cuda::Stream stream) {
                return cuda::graddrop(dtype, tensors, int(num_tasks), leak, active, seed, stream);
              });
}

std::vector<Tensor> graddrop_cuda(TensorList grads, Tensor leak, std::optional<Tensor> active, Tensor seed,
                                  std::vector<int64_t> places) {
  const Draw draw{leak, active, seed, places};
  return into_new(grads, draw.num_tasks(), [&](std::vector<Tensor>& out) { run(grads, draw, out); });
}

void graddrop_inplace_cuda(std::vector<Tensor> out, TensorList grads, Tensor leak, std::optional<Tensor> active, Tensor seed,
                           std::vector<int64_t> places) {
  const Draw draw{leak, active, seed, places};
  into_buffers(out, grads, draw.num_tasks(), [&](std::vector<Tensor>& targets) { run(grads, draw, targets); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("graddrop", TORCH_BOX(&graddrop_cuda));
  m.impl("graddrop_", TORCH_BOX(&graddrop_inplace_cuda));
}

}  // namespace mtlkernels
