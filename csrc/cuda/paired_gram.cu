#include "error.h"
#include "launchers.h"
#include "paired_gram.cuh"

namespace mtlkernels::cuda {
namespace {

using Kernel = void (*)(TensorTable, double*, PairForm);

template <typename T>
Kernel pick(int rows_class) {
  switch (rows_class) {
    case 2: return mtlkernels::paired_gram_chunks<T, 2>;
    case 4: return mtlkernels::paired_gram_chunks<T, 4>;
    case 8: return mtlkernels::paired_gram_chunks<T, 8>;
    case 16: return paired_gram_tensor_core<T, 16>;
    default: return paired_gram_tensor_core<T, 64>;
  }
}

Kernel pick(DType dtype, int rows_class) {
  switch (dtype) {
    case DType::float32: return pick<float>(rows_class);
    case DType::bfloat16: return pick<BFloat16>(rows_class);
    case DType::float16: return pick<__half>(rows_class);
    default: return pick<double>(rows_class);
  }
}

}  // namespace

const char* paired_gram_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, PairForm form,
                               int32_t first_block, double* partials, Stream stream) {
  const GramLaunch shape = gram_launch(dtype, num_rows, true);
  const Kernel kernel = pick(dtype, shape.rows_class);
  if (const char* error = allow_shared(kernel, shape.shared_bytes)) return error;
  for (const Launch& launch : plan_launches(tensors, num_rows, kDeviceChunk, first_block)) {
    kernel<<<launch.num_blocks, shape.threads, shape.shared_bytes, static_cast<cudaStream_t>(stream)>>>(launch.table, partials,
                                                                                                        form);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
