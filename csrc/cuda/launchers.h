#pragma once
// What the bindings call: pointers, sizes and a stream in, launches out. No torch, no CUDA headers.

#include <vector>

#include "../common/gram_plan.h"

namespace mtlkernels::cuda {

/// A CUDA stream, as torch hands it over.
using Stream = void*;

/// out = sum_k w_k g_k for every tensor; the tensors share a dtype. A tensor's pointers are its `num_rows` gradients (null
/// where absent), its result, and its `num_rows` float64 weights on the device. Asynchronous on `stream`; the current device is
/// the tensors'. Returns null, or what CUDA says went wrong.
const char* combine(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, Stream stream);

/// Stage one of gram: partials[block][pair of the row class] for the blocks of all tensors, in their order; the tensors share a
/// dtype and their pointers are `num_rows` gradients. `first_block` blocks of `partials` are taken already. Otherwise as
/// combine.
const char* gram_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int32_t first_block,
                        double* partials, Stream stream);

/// Blocks [begin, end) of stage one make up matrix `slot`.
struct Slot {
  int32_t slot, begin, end;
};

/// Stage two: gram[slot][num_rows][num_rows] from the partials.
const char* gram_finish(const std::vector<Slot>& slots, int num_rows, const double* partials, double* gram, Stream stream);

/// Gram matrices of channels. A tensor's pointers are `num_rows` gradients, its results [channels][num_rows][num_rows], and the
/// elements of a channel as an integer; its size is its number of channels.
const char* gram_channels(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, Stream stream);

}  // namespace mtlkernels::cuda
