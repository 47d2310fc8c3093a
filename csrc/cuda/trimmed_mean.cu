#include "error.h"
#include "launchers.h"
#include "trimmed_mean.cuh"

namespace mtlkernels::cuda {
namespace {

using Kernel = void (*)(TensorTable, const bool*, int);

template <typename T>
Kernel pick_class(int num_rows, int trim) {
  if (num_rows <= 2) return mtlkernels::trimmed_mean<T, 2, 1>;
  if (num_rows <= 4) return mtlkernels::trimmed_mean<T, 4, 1>;
  if (num_rows <= 8) return trim <= 1 ? mtlkernels::trimmed_mean<T, 8, 1> : mtlkernels::trimmed_mean<T, 8, 3>;
  if (trim <= 1) return mtlkernels::trimmed_mean<T, 64, 1>;
  if (trim <= 3) return mtlkernels::trimmed_mean<T, 64, 3>;
  return trim <= 8 ? mtlkernels::trimmed_mean<T, 64, 8> : mtlkernels::trimmed_mean<T, 64, 32>;
}

Kernel pick(DType dtype, int num_rows, int trim) {
  switch (dtype) {
    case DType::float32: return pick_class<float>(num_rows, trim);
    case DType::bfloat16: return pick_class<BFloat16>(num_rows, trim);
    case DType::float16: return pick_class<__half>(num_rows, trim);
    default: return pick_class<double>(num_rows, trim);
  }
}

}  // namespace

const char* trimmed_mean(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int trim, const bool* active,
                         Stream stream) {
  const Kernel kernel = pick(dtype, num_rows, trim);
  const size_t shared_bytes = size_t(trim_table(num_rows)) * sizeof(void*);
  for (const Launch& launch : plan_launches(tensors, num_rows + 1)) {
    kernel<<<launch.num_blocks, kTrimThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(launch.table, active, trim);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
