#include "combine.cuh"
#include "error.h"
#include "launchers.h"

namespace mtlkernels::cuda {
namespace {

using Kernel = void (*)(TensorTable);

template <typename T>
Kernel pick_class(int num_rows) {
  if (num_rows <= 1) return mtlkernels::combine<T, 1>;
  if (num_rows == 2) return mtlkernels::combine<T, 2>;
  if (num_rows == 3) return mtlkernels::combine<T, 3>;
  if (num_rows == 4) return mtlkernels::combine<T, 4>;
  return num_rows <= 8 ? mtlkernels::combine<T, 8> : mtlkernels::combine<T, 64>;
}

Kernel pick(DType dtype, int num_rows) {
  switch (dtype) {
    case DType::float32: return pick_class<float>(num_rows);
    case DType::bfloat16: return pick_class<BFloat16>(num_rows);
    case DType::float16: return pick_class<__half>(num_rows);
    default: return pick_class<double>(num_rows);
  }
}

template <typename T>
Kernel pick_channels(int num_rows) {
  return num_rows <= 2   ? mtlkernels::combine_channels<T, 2>
         : num_rows <= 4 ? mtlkernels::combine_channels<T, 4>
         : num_rows <= 8 ? mtlkernels::combine_channels<T, 8>
                         : mtlkernels::combine_channels<T, 64>;
}

Kernel pick_channels(DType dtype, int num_rows) {
  switch (dtype) {
    case DType::float32: return pick_channels<float>(num_rows);
    case DType::bfloat16: return pick_channels<BFloat16>(num_rows);
    case DType::float16: return pick_channels<__half>(num_rows);
    default: return pick_channels<double>(num_rows);
  }
}

const char* launch_each(Kernel kernel, const std::vector<Launch>& launches, Stream stream) {
  for (auto launch = launches.rbegin(); launch != launches.rend(); ++launch) {
    kernel<<<launch->num_blocks, kCombineThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch->table);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace

const char* combine(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, Stream stream) {
  return launch_each(pick(dtype, num_rows), plan_launches(tensors, num_rows + 2), stream);
}

const char* combine_channels(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, Stream stream) {
  return launch_each(pick_channels(dtype, num_rows), plan_launches(tensors, num_rows + 3, kCombineChannels), stream);
}

}  // namespace mtlkernels::cuda
