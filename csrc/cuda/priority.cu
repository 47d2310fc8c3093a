#include "connection_strength.cuh"
#include "error.h"
#include "launchers.h"
#include "priority.cuh"

namespace mtlkernels::cuda {

const char* priority_combine(DType dtype, const std::vector<PlannedTensor>& tensors, int num_tasks, bool skip_degenerate,
                             int32_t* state, Stream stream) {
  using Kernel = void (*)(TensorTable, int32_t*, bool);
  const Kernel kernels[] = {mtlkernels::priority_combine<float>, mtlkernels::priority_combine<BFloat16>,
                            mtlkernels::priority_combine<__half>, mtlkernels::priority_combine<double>};
  const Kernel kernel = kernels[int(dtype)];
  for (const Launch& launch : plan_launches(tensors, num_tasks + 3 + kPriorityShapeWords, 1)) {
    kernel<<<launch.num_blocks, kPriorityThreads, priority_shared_bytes(num_tasks), static_cast<cudaStream_t>(stream)>>>(
        launch.table, state + 2 * launch.table.first_tensor, skip_degenerate);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

const char* connection_strength(DType dtype, const std::vector<PlannedTensor>& layers, double eps, Stream stream) {
  const auto kernel =
      dtype == DType::float64 ? mtlkernels::connection_strength<double> : mtlkernels::connection_strength<float>;
  for (const Launch& launch : plan_launches(layers, 7, 1)) {
    kernel<<<launch.num_blocks, kStrengthThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch.table, eps);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
