#include "error.h"
#include "launchers.h"
#include "memory.cuh"

namespace mtlkernels::cuda {

const char* memory_combine(DType dtype, const std::vector<PlannedTensor>& tensors, int num_tasks, const double* factors,
                           bool squares, Stream stream) {
  void (*const kernels[])(TensorTable, const double*, bool) = {
      mtlkernels::memory_combine<float>, mtlkernels::memory_combine<BFloat16>, mtlkernels::memory_combine<__half>,
      mtlkernels::memory_combine<double>};
  for (const Launch& launch : plan_launches(tensors, 2 * num_tasks + 1)) {
    kernels[int(dtype)]<<<launch.num_blocks, kMemoryThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch.table, factors,
                                                                                                     squares);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
