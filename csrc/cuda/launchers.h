#pragma once
// What the bindings call: pointers, sizes and a stream in, launches out. No torch, no CUDA headers.

#include <vector>

#include "../common/launch_plan.h"
#include "../common/numeric.h"

namespace mtlkernels::cuda {

/// A CUDA stream, as torch hands it over.
using Stream = void*;

/// out = sum_k w_k g_k for every tensor; the tensors share a dtype. A tensor's pointers are its `num_rows` gradients (null
/// where absent), its result, and its `num_rows` float64 weights on the device. Asynchronous on `stream`; the current device is
/// the tensors'. Returns null, or what CUDA says went wrong.
const char* combine(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, Stream stream);

}  // namespace mtlkernels::cuda
