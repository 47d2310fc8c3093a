#include "error.h"
#include "launchers.h"
#include "perturb.cuh"

namespace mtlkernels::cuda {

const char* perturb(DType dtype, const std::vector<PlannedTensor>& tensors, bool adaptive, Stream stream) {
  void (*const kernels[])(TensorTable, bool) = {mtlkernels::perturb<float>, mtlkernels::perturb<BFloat16>,
                                                mtlkernels::perturb<__half>, mtlkernels::perturb<double>};
  for (const Launch& launch : plan_launches(tensors, kPerturbPointers)) {
    kernels[int(dtype)]<<<launch.num_blocks, kPerturbThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch.table, adaptive);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
