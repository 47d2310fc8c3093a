#pragma once
// The element types of gradients.

#include <cstdint>

namespace mtlkernels {

enum class DType : int { float32, bfloat16, float16, float64 };

inline int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace mtlkernels
