#pragma once
// What every CUDA binding does around its launches.

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launchers.h"
#include "columns.h"

namespace mtlkernels {

/// Kernels take one dtype a launch.
constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16, DType::float64};

constexpr int64_t kMaxTasks = 1024;  // several tensors of that many pointers still fit in one table

/// Numbers that the kernels take as they are on the device, float32 or else `refusal` is raised: contiguous float64.
inline Tensor as_float64(const Tensor& numbers, const char* refusal) {
  using torch::headeronly::ScalarType;
  require(numbers.scalar_type() == ScalarType::Double || numbers.scalar_type() == ScalarType::Float, refusal);
  return torch::stable::contiguous(torch::stable::to(numbers, ScalarType::Double));
}

/// The gradients with every column that is not flat in memory copied to be so.
inline TensorList flat_gradients(const Columns& columns, const TensorList& grads) {
  TensorList flat = grads;
  for (int64_t n = 0; n < columns.size(); ++n)
    for (size_t i = n; columns[n].layout.dim != 0 && i < flat.size(); i += columns.size())
      if (flat[i]) flat[i] = torch::stable::contiguous(*flat[i]);
  return flat;
}

inline cuda::Stream current_stream(int32_t device_index) {
  cuda::Stream stream = nullptr;
  check_torch(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

}  // namespace mtlkernels
