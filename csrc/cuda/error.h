#pragma once
// What CUDA says of a launch, and what it must be told before one.

#include <cuda_runtime.h>

namespace mtlkernels::cuda {

/// Null, or what went wrong.
inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

/// Lets a kernel have `shared_bytes` of dynamic shared memory. Null, or what went wrong.
template <typename Kernel>
const char* allow_shared(Kernel kernel, int shared_bytes) {
  if (shared_bytes <= 48 * 1024) return nullptr;  // what every kernel gets unasked
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mtlkernels::cuda
