#include "error.h"
#include "launchers.h"
#include "mix.cuh"

namespace mtlkernels::cuda {

const char* mix(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int num_results,
                const double* coefficients, Stream stream) {
  using Kernel = void (*)(TensorTable, int32_t, const double*);
  const Kernel kernels[] = {mtlkernels::mix<float>, mtlkernels::mix<BFloat16>, mtlkernels::mix<__half>,
                            mtlkernels::mix<double>};
  const Kernel kernel = kernels[int(dtype)];
  const int shared_bytes = mix_shared_bytes(dtype, num_rows, num_results);
  if (const char* error = allow_shared(kernel, shared_bytes)) return error;
  for (const Launch& launch : plan_launches(tensors, num_rows + num_results)) {
    kernel<<<launch.num_blocks, mix_threads(num_rows), shared_bytes, static_cast<cudaStream_t>(stream)>>>(
        launch.table, num_rows, coefficients);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
