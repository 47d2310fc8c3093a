#include "error.h"
#include "gradient_dropout.cuh"
#include "launchers.h"

namespace mtlkernels::cuda {
namespace {

using Kernel = void (*)(TensorTable, const double*, const int64_t*);

template <bool gaussian>
Kernel pick(DType dtype) {
  switch (dtype) {
    case DType::float32: return mtlkernels::gradient_dropout<float, gaussian>;
    case DType::bfloat16: return mtlkernels::gradient_dropout<BFloat16, gaussian>;
    case DType::float16: return mtlkernels::gradient_dropout<__half, gaussian>;
    default: return mtlkernels::gradient_dropout<double, gaussian>;
  }
}

}  // namespace

const char* gradient_dropout(DType dtype, const std::vector<PlannedTensor>& tensors, bool gaussian, const double* p,
                             const int64_t* seed, Stream stream) {
  const Kernel kernel = gaussian ? pick<true>(dtype) : pick<false>(dtype);
  for (const Launch& launch : plan_launches(tensors, kNoisePointers)) {
    kernel<<<launch.num_blocks, kNoiseThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch.table, p, seed);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
