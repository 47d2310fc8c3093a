#pragma once
// What CUDA says of the launch before.

#include <cuda_runtime_api.h>

namespace mtlkernels::cuda {

/// Null, or what went wrong.
inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mtlkernels::cuda
