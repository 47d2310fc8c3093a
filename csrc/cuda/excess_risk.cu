#include "error.h"
#include "excess_risk.cuh"
#include "launchers.h"

namespace mtlkernels::cuda {

const char* excess_risk_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, double epsilon, Stream stream) {
  void (*const kernels[])(TensorTable, double) = {
      mtlkernels::excess_risk_chunks<float>, mtlkernels::excess_risk_chunks<BFloat16>, mtlkernels::excess_risk_chunks<__half>,
      mtlkernels::excess_risk_chunks<double>};
  for (const Launch& launch : plan_launches(tensors, kExcessPointers)) {
    kernels[int(dtype)]<<<launch.num_blocks, kExcessThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch.table, epsilon);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
