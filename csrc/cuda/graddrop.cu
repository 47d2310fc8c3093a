#include "error.h"
#include "graddrop.cuh"
#include "launchers.h"

namespace mtlkernels::cuda {
namespace {

using Kernel = void (*)(TensorTable, const double*, const bool*, const int64_t*);

template <typename T>
Kernel pick_class(int num_rows) {
  if (num_rows <= 1) return mtlkernels::graddrop<T, 1>;
  if (num_rows == 2) return mtlkernels::graddrop<T, 2>;
  if (num_rows == 3) return mtlkernels::graddrop<T, 3>;
  if (num_rows == 4) return mtlkernels::graddrop<T, 4>;
  return num_rows <= 8 ? mtlkernels::graddrop<T, 8> : mtlkernels::graddrop<T, 64>;
}

Kernel pick(DType dtype, int num_rows) {
  switch (dtype) {
    case DType::float32: return pick_class<float>(num_rows);
    case DType::bfloat16: return pick_class<BFloat16>(num_rows);
    case DType::float16: return pick_class<__half>(num_rows);
    default: return pick_class<double>(num_rows);
  }
}

}  // namespace

const char* graddrop(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, const double* leak,
                     const bool* active, const int64_t* seed, Stream stream) {
  const Kernel kernel = pick(dtype, num_rows);
  for (const Launch& launch : plan_launches(tensors, num_rows + 2)) {
    kernel<<<launch.num_blocks, kDropThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch.table, leak, active, seed);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
