#include "error.h"
#include "finish.cuh"
#include "launchers.h"

namespace mtlkernels::cuda {
namespace {

template <typename Options>
using Kernel = void (*)(TensorTable, const double*, const bool*, Options);

template <typename T, typename Options>
Kernel<Options> pick_class(int num_rows) {
  if (num_rows <= 1) return finish<T, 1, Options>;
  if (num_rows == 2) return finish<T, 2, Options>;
  if (num_rows == 3) return finish<T, 3, Options>;
  if (num_rows == 4) return finish<T, 4, Options>;
  return num_rows <= 8 ? finish<T, 8, Options> : finish<T, 64, Options>;
}

template <typename Options>
Kernel<Options> pick(DType dtype, int num_rows) {
  switch (dtype) {
    case DType::float32: return pick_class<float, Options>(num_rows);
    case DType::bfloat16: return pick_class<BFloat16, Options>(num_rows);
    case DType::float16: return pick_class<__half, Options>(num_rows);
    default: return pick_class<double, Options>(num_rows);
  }
}

template <typename Options>
const char* launch_each(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, const double* lr,
                        const bool* skip, const Options& options, Stream stream) {
  const Kernel<Options> kernel = pick<Options>(dtype, num_rows);
  static_assert(sizeof(lr) + sizeof(skip) + sizeof(Options) <= kOtherArguments, "what a kernel takes besides the table");
  for (const Launch& launch : plan_launches(tensors, num_rows + kFinishPointers<Options>)) {
    kernel<<<launch.num_blocks, kFinishThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch.table, lr, skip, options);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace

const char* combine_sgd(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, const double* lr,
                        const bool* skip, const SgdOptions& options, Stream stream) {
  return launch_each(dtype, tensors, num_rows, lr, skip, options, stream);
}

const char* combine_adam(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, const double* lr,
                         const bool* skip, const AdamOptions& options, Stream stream) {
  return launch_each(dtype, tensors, num_rows, lr, skip, options, stream);
}

}  // namespace mtlkernels::cuda
