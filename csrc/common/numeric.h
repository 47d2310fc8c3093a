#pragma once
// The element types of gradients, and what marks code that runs on host and device.

#include <cstdint>

#if defined(__CUDACC__)
#define MTL_HOST_DEVICE __host__ __device__
#else
#define MTL_HOST_DEVICE
#endif

namespace mtlkernels {

enum class DType : int { float32, bfloat16, float16, float64 };

inline int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace mtlkernels
